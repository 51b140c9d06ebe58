"""The private names of transformers and TRL that the trainers override: a change is named, not trained with."""

import inspect

import pytest
from transformers import Trainer

from vqr1_metric.train_ranker import trl_private
from vqr1_metric.train_ranker.trl_private import GRPO_NAMES, TRAINER_NAMES, check_names


@pytest.mark.parametrize("name", TRAINER_NAMES)
def test_transformers_has(name: str) -> None:
    found = tuple(inspect.signature(getattr(Trainer, name)).parameters)
    assert found == TRAINER_NAMES[name], f"transformers changed Trainer.{name}: it takes {', '.join(found)}"


@pytest.mark.parametrize("name", GRPO_NAMES)
def test_trl_has(name: str, trl_trainer) -> None:
    from trl import GRPOTrainer

    found = tuple(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert found == GRPO_NAMES[name], f"TRL changed GRPOTrainer.{name}: it takes {', '.join(found)}"


def test_every_override_of_a_private_method_is_listed(trl_trainer) -> None:
    """Nothing private of either library is overridden elsewhere."""
    from trl import GRPOTrainer

    from vqr1_metric.train_ranker.exact import ExactRankerTrainer

    for cls, base, listed in (
        (ExactRankerTrainer, Trainer, TRAINER_NAMES),
        (trl_trainer.RankerTrainer, GRPOTrainer, {**TRAINER_NAMES, **GRPO_NAMES}),
    ):
        own = [one for one in cls.__mro__ if one.__module__.startswith("vqr1_metric")]
        private = {name for one in own for name in vars(one) if name.startswith("_") and not name.startswith("__")}
        overridden = {name for name in private if hasattr(base, name)}
        assert overridden == set(listed), overridden ^ set(listed)
        assert all(any(name in vars(getattr(trl_private, c.__name__, object)) for c in own) for name in overridden)


def test_a_change_is_an_error_that_says_what_changed() -> None:
    class Changed:
        def _compute_loss(self, model, inputs, more):
            raise AssertionError

    with pytest.raises(ImportError, match=r"trl .* private method .*Changed._compute_loss takes self, model, in"):
        check_names(Changed, {"_compute_loss": ("self", "model", "inputs")}, "trl")
    with pytest.raises(ImportError, match=r"Changed._gone is gone"):
        check_names(Changed, {"_gone": ("self",)}, "trl")


def test_the_batch_of_replies_has_the_keys_that_the_filter_changes(trl_trainer) -> None:
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    for key in trl_private.BATCH_KEYS:
        assert f'"{key}"' in source, f"TRL's batch of replies has no {key} any more"
