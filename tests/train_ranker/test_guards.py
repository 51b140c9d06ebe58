"""A run that is broken or learns nothing ends with a reason, non-zero; signals end it with a checkpoint."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from vqr1_metric.cli import main
from vqr1_metric.train_ranker.callbacks import Guard, all_finite
from vqr1_metric.train_ranker.checks import TrainingError
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.exact import ExactRankerTrainer
from vqr1_metric.train_ranker.run import Stopped, last_checkpoint, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def exact(settings: dict, model: Path, output: Path, **more) -> RankerConfig:
    return RankerConfig(
        **{**settings, "model": str(model), "output_dir": str(output), "objective": "exact", "micro_batch": 4, **more}
    )


def guard(**settings) -> tuple[Guard, TrainerState, TrainerControl]:
    return Guard(RankerConfig(**settings)), TrainerState(global_step=7), TrainerControl()


def test_a_collapsed_run_is_stopped_with_a_reason() -> None:
    stop, state, control = guard(collapse_spread=0.02, collapse_patience=3)
    for spread in (0.001, 0.001, 0.5, 0.01, 0.01):
        stop.on_log(None, state, control, logs={"spread": spread})
    stop.on_log(None, state, control, logs={"loss": 1.0})  # a log without scores says nothing
    with pytest.raises(TrainingError, match=r"stopped at step 7: in the last 3 logs .* lower learning_rate"):
        stop.on_log(None, state, control, logs={"spread": 0.0})


def test_nothing_readable_is_seen_in_logs_and_at_a_short_runs_end() -> None:
    stop, state, control = guard(unreadable_patience=3)
    for readable in (0.0, 0.0, 0.02, 0.0, math.nan):
        stop.on_log(None, state, control, logs={"readable": readable, "spread": math.nan})
    stop.on_train_end(None, state, control)  # some were readable
    with pytest.raises(TrainingError, match="no reply held a score that could be read in the last 3 logs"):
        stop.on_log(None, state, control, logs={"readable": 0.0})
    short, *_ = guard(unreadable_patience=10)
    short.on_log(None, state, control, logs={"readable": 0.0})
    with pytest.raises(TrainingError, match="in the last 1 logs"):
        short.on_train_end(None, state, control)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "kl"])
def test_figures_that_are_no_numbers_end_the_run(name: str) -> None:
    stop, state, control = guard()
    with pytest.raises(TrainingError, match=f"{name} is nan in step 7"):
        stop.on_log(None, state, control, logs={name: math.nan})


def test_gradients_are_looked_at_before_they_reach_the_weights() -> None:
    stop, state, control = guard()
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    stop.on_pre_optimizer_step(None, state, control, model=model)
    model.bias.grad[1] = math.inf
    with pytest.raises(TrainingError, match="the gradient of step 8 is not finite"):
        stop.on_pre_optimizer_step(None, state, control, model=model)
    assert all_finite([]) and all_finite([torch.zeros(0)])  # as weights are that ZeRO-3 divides
    assert all_finite([torch.zeros(0), torch.ones(2)]) and not all_finite([torch.ones(2), torch.tensor([math.nan])])


def test_validation_that_falls_far_below_the_start() -> None:
    stop, state, control = guard(validation_drop=0.2)
    stop.start = 0.7
    stop.on_evaluate(None, state, control, metrics={"eval_srcc": 0.55, "eval_pairs": 0.1})
    assert control.should_save  # the best so far
    for figure in (0.4, math.nan):
        with pytest.raises(TrainingError, match=r"from 0.700 at the start, by more than validation_drop"):
            stop.on_evaluate(None, state, control, metrics={"eval_srcc": figure})
    allowed, state, control = guard(validation_drop=0)
    allowed.start = 0.7
    allowed.on_evaluate(None, state, control, metrics={"eval_srcc": 0.0})


def test_broken_weights_end_non_zero_and_do_not_block_the_folder(
    rated: Path, warm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size = ["--images-per-device", "4", "--images-per-comparison", "4", "--max-pixels", "3136"]
    command = ["train", "--preset", "nano", "--model", str(warm_model), "--data", str(rated / "noise.csv"), *size]
    command += ["--validation-fraction", "0", "--set", "logging_steps=1", "-o", str(tmp_path / "out")]
    assert main([*command, "--learning-rate", "1e6", "--max-steps", "4"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "vqr1: " in error and any(text in error for text in ("not finite", "the run is broken", "no reply held"))
    assert not (tmp_path / "out/config.json").exists()
    assert main([*command, "--max-steps", "1"]) == 0


def test_replies_that_would_be_cut_off_are_found_at_the_start(
    trl_trainer, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    config = RankerConfig(
        **{**settings, "model": str(warm_model), "output_dir": str(tmp_path / "out"), "max_new_tokens": 4}
    )
    with pytest.raises(TrainingError, match=r"\d of 8 replies of the start model were cut off at max_new_tokens=4"):
        train(config)
    assert not (tmp_path / "out/ranker.json").exists()


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_the_best_is_kept_beside_the_last_and_both_are_named(
    lora_rank: int, settings: dict, warm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.5, 0.4, 0.6, 0.55])  # the start, and after steps 1, 2 and 3
    monkeypatch.setattr(
        ExactRankerTrainer, "validate", lambda self: dict.fromkeys(("srcc", "srcc_noise"), next(figures))
    )
    more = {"validation_fraction": 0.34, "eval_steps": 1, "max_steps": 3, "save_steps": 100, "lora_rank": lora_rank}
    said: list[str] = []
    output = train(exact(settings, warm_model, tmp_path / "out", **more), tell=said.append)
    assert said[0] == "validation of the start model: SRCC noise 0.500"
    assert f"0.500 at the start, 0.550 at the end (step 3), in {output}" in said
    assert f"0.600 at step 2, the best, in {output / 'best'}" in said
    best, last = (load_file(folder / "model.safetensors") for folder in (output / "best", output))
    assert best.keys() == last.keys() and any(not torch.equal(best[name], last[name]) for name in best)
    if not lora_rank:
        written = load_file(output / "checkpoint-2/model.safetensors")
        assert all(torch.equal(best[name], written[name]) for name in best)
    assert not (output / "best/optimizer.pt").exists() and "| 2 | 0.600 |" in (output / "best/README.md").read_text()


class SignalAt(TrainerCallback):
    """A signal to this very process in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(
    number: int, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    config = exact(settings, warm_model, tmp_path / "out")
    with pytest.raises(Stopped, match="stopped after step 3, with a checkpoint; it goes on with --resume") as stopped:
        train(config, callbacks=[SignalAt(2, number)])
    assert stopped.value.number == number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-3" and not (tmp_path / "out/config.json").exists()
    train(config, resume=True)
    train(exact(settings, warm_model, tmp_path / "whole"))
    broken, whole = (load_file(tmp_path / run / "model.safetensors") for run in ("out", "whole"))
    assert all(torch.equal(broken[name], whole[name]) for name in whole)


def test_the_command_says_what_stopped_it(
    settings: dict, rated: Path, warm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from vqr1_metric.train_ranker import run

    def stop(*_: object, **__: object) -> Path:
        raise Stopped(signal.SIGTERM, "SIGTERM: stopped after step 3")

    monkeypatch.setattr(run, "train", stop)
    data = ["--data", str(rated / "noise.csv"), "--preset", "nano", "-o", str(tmp_path / "out")]
    assert main(["train", *data]) == 128 + signal.SIGTERM
    assert "SIGTERM: stopped after step 3" in capsys.readouterr().err


def test_figures_of_the_start_are_kept_for_a_resumed_run(settings: dict, warm_model: Path, tmp_path: Path) -> None:
    config = exact(settings, warm_model, tmp_path / "out", validation_fraction=0.34, save_steps=2, validation_drop=0)
    with pytest.raises(Stopped):
        train(config, callbacks=[SignalAt(1, signal.SIGTERM)])
    start = json.loads((tmp_path / "out/data.json").read_text())["start"]
    said: list[str] = []
    train(config, resume=True, tell=said.append)
    assert said[0].startswith("validation of the start model: SRCC noise ")
    assert f"{start['eval_srcc_noise']:.3f}" in said[0]
