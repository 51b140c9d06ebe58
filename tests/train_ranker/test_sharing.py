"""The tower sees each picture of a pass once; nothing else changes. Zero spread."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.6")

from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.data import read_data
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.sharing import equal_pictures, share_pictures


def test_equal_pictures_are_found_wherever_they_stand() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 2], [1, 2, 4], [1, 2, 2], [1, 4, 2]])
    a, b = torch.rand(4, 3), torch.rand(8, 3)
    other = a.flip(0)  # the same sum, other values
    assert equal_pictures(torch.cat([a, b, a, b, other, b]), grid) == [0, 1, 0, 3, 4, 1]


def test_tokens_and_gradients_are_those_without_sharing(tiny_model: Path, rated: Path) -> None:
    results = []
    for share in (False, True):
        loaded = load_model(ModelSpec(str(tiny_model), device="cpu"))
        visual = loaded.model.model.visual.requires_grad_(True)
        processor = RankerProcessor(loaded, read_data([rated / "noise.csv"])[0].images)
        patches, grids = zip(*(processor.patches(i) for i in ("0", "1", "0", "2", "1", "0")), strict=True)
        if share:
            share_pictures(visual)
            share_pictures(visual)  # twice is once
        seen = []
        visual.patch_embed.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        output = visual(torch.cat(patches), grid_thw=torch.tensor(grids))
        assert seen == [sum(map(len, patches)) // (2 if share else 1)]
        weights = torch.linspace(0, 1, len(output.pooler_output))[:, None]
        deep = getattr(output, "deepstack_features", None) or []
        (sum((tokens * weights).sum() for tokens in [output.pooler_output, *deep])).backward()
        gradients = {name: w.grad for name, w in visual.named_parameters() if w.grad is not None}
        results.append(([output.pooler_output, *deep], gradients))
    (tokens, gradients), (shared_tokens, shared_gradients) = results
    assert gradients.keys() == shared_gradients.keys() and len(tokens) == len(shared_tokens)
    for one, other in zip(tokens, shared_tokens, strict=True):
        torch.testing.assert_close(one, other)
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-4, rtol=1e-3)


def test_different_pictures_pass_as_they_are(tiny_qwen2_5_vl: Path) -> None:
    visual = load_model(ModelSpec(str(tiny_qwen2_5_vl), device="cpu")).model.model.visual
    share_pictures(visual)
    size = visual.config.in_channels * visual.config.temporal_patch_size * visual.config.patch_size**2
    output = visual(torch.rand(8, size), grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]))
    assert output.last_hidden_state is not None and len(output.pooler_output) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_step_sends_each_picture_through_once(
    trl_trainer, lora_rank: int, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    from vqr1_metric.train_ranker.run import prepare_data

    steps = []
    for share in (False, True):
        config = RankerConfig(
            **{**settings, "model": str(warm_model), "output_dir": str(tmp_path), "micro_batch": 12, "max_steps": 1},
            share_pictures=share,
            lora_rank=lora_rank,
        )
        trainer = trl_trainer.RankerTrainer(None, config, *prepare_data(config))
        rows = []
        trainer.loaded.model.model.visual.patch_embed.register_forward_hook(
            lambda _, args, __, rows=rows: rows.append(len(args[0]))
        )
        trainer.train()
        reward = next(entry["reward"] for entry in trainer.state.log_history if "reward" in entry)
        steps.append((rows, reward))
    (all_rows, reward), (shared_rows, shared_reward) = steps
    assert len(all_rows) == len(shared_rows) >= 2  # sampling and log-probabilities (and the start model's)
    assert [3 * rows for rows in shared_rows] == all_rows  # of 3 replies
    assert shared_reward == pytest.approx(reward, abs=1e-6)


def test_groups_without_spread_leave_the_loss(trl_trainer) -> None:
    from vqr1_metric.train_ranker import trl_private

    drop_zero_spread = trl_private.drop_zero_spread
    batch = {
        "advantages": torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0]),
        "completion_mask": torch.ones(8, 3, dtype=torch.long),
        "num_items_in_batch": torch.tensor(24),
    }
    assert drop_zero_spread(batch, 2) == 0.5
    assert batch["completion_mask"].any(1).tolist() == [True, True, False, False, True, True, False, False]
    assert int(batch["num_items_in_batch"]) == 12
    nothing = {**batch, "advantages": torch.zeros(8)}
    assert drop_zero_spread(nothing, 2) == 0 and int(nothing["num_items_in_batch"]) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_loss_is_the_mean_of_what_is_left(
    loss: str, trl_trainer, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    """The loss of four groups, two of them without spread, is that of the other two alone."""
    from vqr1_metric.train_ranker import trl_private
    from vqr1_metric.train_ranker.run import prepare_data

    config = RankerConfig(
        **{**settings, "model": str(warm_model), "output_dir": str(tmp_path)}, drop_zero_spread=True, loss=loss
    )
    trainer = trl_trainer.RankerTrainer(None, config, *prepare_data(config))
    trainer.current_gradient_accumulation_steps = 1
    k, tokens = config.num_generations, 5
    logps, reference = -torch.rand(4 * k, tokens), -torch.rand(4 * k, tokens)
    advantages = torch.randn(4, k)
    advantages[1] = advantages[3] = 0

    def loss_of(groups: list[int]) -> float:
        rows = [i * k + j for i in groups for j in range(k)]
        chosen = logps[rows]
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (chosen, torch.zeros_like(chosen), None)
        batch = {
            "prompt_ids": torch.zeros(len(rows), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(rows), 1),
            "completion_ids": torch.zeros(len(rows), tokens, dtype=torch.long),
            "completion_mask": torch.ones(len(rows), tokens),
            "advantages": advantages.flatten()[rows],
            "ref_per_token_logps": reference[rows],
            "num_items_in_batch": torch.tensor(len(rows) * tokens),
        }
        trainer._kept = trl_private.drop_zero_spread(batch, k)
        return float(trainer._compute_loss(trainer.model, batch))

    assert loss_of([0, 1, 2, 3]) == pytest.approx(loss_of([0, 2]), rel=1e-5)
    assert loss_of([1, 3]) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_run_that_drops_groups_without_spread(trl_trainer, settings: dict, warm_model: Path, tmp_path: Path) -> None:
    """Greedy enough that all replies are alike: nothing is left, and the weights stay as they are."""
    from safetensors.torch import load_file

    from vqr1_metric.train_ranker.run import train

    config = RankerConfig(
        **{**settings, "model": str(warm_model), "output_dir": str(tmp_path / "out"), "max_steps": 2},
        drop_zero_spread=True,
        temperature=1e-3,
    )
    train(config)
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [entry["frac_reward_zero_std"] for entry in log if "reward" in entry] == [1, 1]
    before, after = load_file(warm_model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropping_belongs_to_sampling() -> None:
    config = RankerConfig.preset("nano", data=["a.csv"], output_dir="out", drop_zero_spread=True)
    with pytest.raises(ConfigError, match="Expected drop_zero_spread only with objective='sampled'"):
        config.check()
