"""Settings are typed and checked before anything is read; files of settings; the plan of a dry run."""

import json
import math
from pathlib import Path

import pytest

from vqr1_metric.cli import main
from vqr1_metric.train_ranker.checks import ConfigError
from vqr1_metric.train_ranker.config import Loss, RankerConfig, Scheduler, read_settings

COMMAND = ["train", "--preset", "nano", "--data", "none.csv", "-o"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("freeze_vision=False", "freeze_vision", False),
        ("freeze_vision=no", "freeze_vision", False),
        ("merge=0", "merge", False),
        ("merge=on", "merge", True),
        ("learning_rate=1e-5", "learning_rate", 1e-5),
        ("max_steps=1e3", "max_steps", 1000),
        ("seed=7", "seed", 7),
        ("lora_alpha=none", "lora_alpha", None),
        ("report_to=tensorboard", "report_to", ["tensorboard"]),
        ('lower_is_better=["a", "b"]', "lower_is_better", ["a", "b"]),
        ('objective="sampled"', None, "Expected objective to be one of 'sampled', 'exact'"),
        ("loss=grp", None, "Expected loss to be one of 'grpo', 'dr_grpo'"),
        ("importance_sampling=tokn", None, "Expected importance_sampling to be one of 'token', 'sequence'"),
        ("scale_rewards=grup", None, "Expected scale_rewards to be one of 'group', 'batch', 'none'"),
        ("lr_scheduler=cosin", None, "Expected lr_scheduler to be one of 'linear', 'cosine'"),
        ("kl_weight=0,04", None, "Expected kl_weight to be a number, but got '0,04'"),
        ("epochs=two", None, "Expected epochs to be a number, but got 'two'"),
        ("learning_rate=1e-5x", None, "Expected learning_rate to be a number"),
        ("learning_rate=nan", None, "Expected learning_rate to be a number"),
        ("micro_batch=2.5", None, "Expected micro_batch to be a whole number"),
        ("temperature=0", None, "Expected temperature of above 0, but got 0.0"),
        ("report_to=tensorbord", None, "Expected report_to to be one of 'tensorboard', 'trackio', 'wandb'"),
        ("dtype=float8", None, "Expected dtype to be one of 'float32'"),
        ("freeze_vison=true", None, "got 'freeze_vison': do you mean 'freeze_vision'?"),
        ("freeze_vision=maybe", None, "Expected freeze_vision to be true or false, but got 'maybe'"),
        ("collapse_patience", None, "expected --set NAME=VALUE, but got 'collapse_patience'"),
    ],
)
def test_a_setting_is_its_type_or_one_line_before_anything_is_read(
    text: str, name: str | None, value: object, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if name is not None:
        setting, _, given = text.partition("=")
        config = RankerConfig.of({setting: given})
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
        return
    assert main([*COMMAND, str(tmp_path / "out"), "--set", text]) == 1
    error = capsys.readouterr().err
    assert str(value) in error and len(error.splitlines()) == 1 and "none.csv" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("objective", ["exact", "sampled"])
@pytest.mark.parametrize(
    "setting", ["trainer.learning_rat=1", "trainer.warmup_steps=many", "trainer.save_strategy=sometimes"]
)
def test_the_trainers_own_settings_are_checked_before_weights_load(
    objective: str, setting: str, rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture, trl_trainer
) -> None:
    data = ["--data", str(rated / "noise.csv"), "--objective", objective, "--images-per-device", "4"]
    more = [
        "--images-per-comparison",
        "4",
        "--micro-batch",
        "4",
        "--validation-fraction",
        "0",
        "--num-generations",
        "2",
    ]
    command = [
        "train",
        "--preset",
        "nano",
        "--model",
        str(tmp_path / "no-model"),
        *data,
        *more,
        "--num-generations",
        "2",
        "-o",
    ]
    assert main([*command, str(tmp_path / "out"), "--set", setting]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("vqr1: Expected settings that ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_file_of_settings_and_options_before_it(tmp_path: Path) -> None:
    from vqr1_metric.cli import build_parser
    from vqr1_metric.cli.train import build_config

    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: nano\ndata: [a.csv, b.csv]\nlearning_rate: 1e-4\nfreeze_vision: yes\nmax_steps: 10\n"
        "trainer:\n  weight_decay: 0.1\n"
    )
    options = ["--config", str(file), "-o", str(tmp_path), "--max-steps", "5", "--set", "trainer.deepspeed=x.json"]
    config = build_config(build_parser("train").parse_args(["train", *options]))
    assert (config.model, config.objective, config.data) == ("nano", "exact", ["a.csv", "b.csv"])
    assert (config.learning_rate, config.freeze_vision, config.max_steps) == (1e-4, True, 5)
    assert config.trainer == {"weight_decay": 0.1, "deepspeed": "x.json"}
    (tmp_path / "run.json").write_text(json.dumps({"seed": 3}))
    assert read_settings(tmp_path / "run.json") == {"seed": 3}
    for name, text, message in [
        ("bad.yaml", "a: [1", "it cannot be read"),
        ("list.yaml", "- 1", "it holds list"),
        ("none.yaml", None, "cannot be read"),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_settings(tmp_path / name)


def test_the_choices_are_those_of_the_libraries() -> None:
    """What TRL and transformers know and this does not, or the reverse, is seen here."""
    from typing import get_args

    transformers = pytest.importorskip("transformers")
    known = {scheduler.value for scheduler in transformers.SchedulerType}
    assert known - {"greedy"} <= set(get_args(Scheduler))
    trl = pytest.importorskip("trl", minversion="1.16")
    text = trl.GRPOConfig.__doc__
    for loss in get_args(Loss):
        assert f'- `"{loss}"`' in text


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("objective", ["exact", "sampled"])
def test_a_dry_run_tells_what_will_happen_and_writes_nothing(
    objective: str, rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture, trl_trainer
) -> None:
    command = [
        "train",
        "--preset",
        "nano",
        "--objective",
        objective,
        "--data",
        str(rated / "noise.csv"),
        "--epochs",
        "4",
    ]
    size = ["--images-per-device", "4", "--images-per-comparison", "4", "--micro-batch", "8", "--num-generations", "2"]
    assert (
        main(
            [
                *command,
                *size,
                "--epochs",
                "4",
                "--validation-fraction",
                "0.34",
                "-o",
                str(tmp_path / "out"),
                "--dry-run",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "  model: 'nano'" in told and "noise: 8 pictures to train on, 4 to validate on" in told
    assert "steps: 8 (2 in an epoch), 4 pictures each" in told
    assert "memory: about 0." in told and "time: about " in told and "not measured" in told
    assert not (tmp_path / "out").exists()


def test_the_plan_grows_with_what_costs() -> None:
    from dataclasses import replace

    from vqr1_metric.train_ranker.plan import MACHINES, Plan, Shape

    shape = Shape(7.6e9, 0.7e9, 0.54e9, 28, 3584, 18_944, 512, 32, 1280, 3420)
    base = Plan(MACHINES["A100"], 16, shape, 252)
    held = base.memory()["weights, gradients, optimiser"]
    assert held == pytest.approx(8.3e9 * 16 / 16) and 20 < base.seconds()["a step"] < 45  # the paper's is 38
    lora = replace(base, devices=1, sharded=False, lora_rank=64, micro_batch=6)
    assert lora.memory()["start model"] == 0 and lora.memory()["weights, gradients, optimiser"] > 16.6e9
    assert lora.seconds()["sampling"] > base.seconds()["sampling"]  # an adapter that is not merged
    assert replace(lora, four_bit=True).weights() < 0.4 * lora.weights()
    large = replace(base, visual_tokens=999)  # there the backward pass is the peak
    assert replace(large, micro_batch=24).memory()["peak"] < large.memory()["peak"]
    exact = replace(base, sampled=False)
    assert exact.seconds()["sampling"] == 0 and exact.seconds()["a step"] < 0.2 * base.seconds()["a step"]
    assert all(math.isfinite(value) for value in [*exact.memory().values(), *exact.seconds().values()])


def test_a_tower_that_is_no_transformer_is_counted_by_running_it() -> None:
    from dataclasses import replace

    from transformers import AutoConfig

    from vqr1_metric.backends.loading import EMBEDDED
    from vqr1_metric.train_ranker.plan import MACHINES, Plan, Shape

    shape = Shape.of(AutoConfig.from_pretrained(str(EMBEDDED["nano"])))
    assert (shape.vision_layers, shape.vision_width, shape.vision_inner) == (0, 0, 0)
    # The stem alone: 32 channels at 16x16 places, 3x3x3 products each.
    assert shape.tower_products > 16**2 * 32 * 27 and shape.tower_kept > 16**2 * 32
    plan = Plan(MACHINES["A100"], 1, shape, 64, sampled=False)
    assert plan.memory()["peak"] > replace(plan, vision_trained=False).memory()["peak"]
    assert plan.seconds()["a step"] < Plan(MACHINES["A100"], 1, shape, 640, sampled=False).seconds()["a step"]
