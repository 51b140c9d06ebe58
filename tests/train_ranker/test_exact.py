"""The closed form against many samples and against plain calculus; exact resuming; the command line."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vqr1_metric import QualityScorer
from vqr1_metric.cli import main
from vqr1_metric.functional.distribution import GRID_SIZE, ScoreDistribution
from vqr1_metric.functional.reward import ranking_reward
from vqr1_metric.train_ranker.coldstart import reply, teaching_scores
from vqr1_metric.train_ranker.config import ConfigError, RankerConfig
from vqr1_metric.train_ranker.data import DataError
from vqr1_metric.train_ranker.exact import expected_loss, labels, outcome_kl, outcomes, score_rewards
from vqr1_metric.train_ranker.run import last_checkpoint, prepare_data, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vqr1_metric.train_ranker.exact import ExactRankerTrainer


def distribution(pictures: int = 3, dtype: torch.dtype = torch.float64) -> ScoreDistribution:
    """Bell-shaped score distributions of different means and widths, not all of their mass inside the grammar."""
    grid = torch.linspace(1, 5, GRID_SIZE, dtype=dtype)
    middle = torch.linspace(2, 4, pictures, dtype=dtype)[:, None]
    logits = -0.5 * ((grid - middle) / torch.linspace(0.3, 0.8, pictures, dtype=dtype)[:, None]) ** 2
    coverage, tag = torch.full((pictures,), 0.9, dtype=dtype), torch.full((pictures,), 0.8, dtype=dtype)
    return ScoreDistribution(logits.softmax(-1), coverage, tag)


ROWS = [{"quality": quality, "share": None} for quality in (20.0, 10.0, 20.0)]


def test_the_rewards_are_those_of_many_samples() -> None:
    dist = distribution()
    index = torch.multinomial(dist.probabilities, 200_000, replacement=True)
    sampled = ranking_reward(dist.grid[index], torch.tensor([20.0, 10.0, 20.0], dtype=torch.float64))
    exact = score_rewards(dist, dist.mean, dist.variance, labels(ROWS, 3), 1e-6, 1e-6)
    torch.testing.assert_close((dist.probabilities * exact).sum(1), sampled.mean(1), atol=3e-3, rtol=0)
    torch.testing.assert_close(exact.gather(1, index), sampled, atol=5e-3, rtol=0)


def test_the_gradient_is_that_of_the_policy() -> None:
    """Against the score function estimator over all outcomes, with the advantages of the published form."""
    logits = torch.randn(3, GRID_SIZE + 1, dtype=torch.float64, requires_grad=True)
    probability = logits.softmax(-1)
    readable = 1 - probability[:, -1]
    dist = ScoreDistribution(probability[:, :-1] / readable[:, None], readable, torch.ones_like(readable))
    torch.testing.assert_close(outcomes(dist), probability)
    rewards = score_rewards(dist, dist.mean, dist.variance, labels(ROWS, 3), 1e-6, 1e-6)
    (found,) = torch.autograd.grad(expected_loss(outcomes(dist), rewards, 1.0, through_rewards=False).mean(), logits)

    with torch.no_grad():
        earned = torch.cat([rewards + 1.0, torch.zeros(3, 1)], dim=1)
        mean = (probability * earned).sum(1, keepdim=True)
        std = (probability * (earned - mean) ** 2).sum(1, keepdim=True).sqrt()
        advantage = (earned - mean) / (std + 1e-4)
        # d log p_o / d logit = 1{o} - p, weighted by p_o A_o and summed over the outcomes o
        expected = -(probability * advantage - probability * (probability * advantage).sum(1, keepdim=True)) / 3
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_direct_gradient_is_that_of_the_expected_fidelity() -> None:
    logits = torch.randn(3, GRID_SIZE, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, GRID_SIZE, dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(3, dtype=torch.float64)
        dist = ScoreDistribution(values.softmax(-1), 0.9 * ones, ones)
        rewards = score_rewards(dist, dist.mean, dist.variance, labels(ROWS, 3), 1e-6, 1e-6)
        return expected_loss(outcomes(dist), rewards, 0.5, through_rewards=True).mean()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-5
    numeric = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric.detach()), rel=1e-5)


def test_divergence_from_the_start_model() -> None:
    dist = distribution()
    assert outcome_kl(outcomes(dist), outcomes(dist)).abs().max() == 0
    p, q = outcomes(dist), outcomes(distribution()).flip(0)
    expected = sum(torch.nn.functional.kl_div(q[i].log(), p[i], reduction="sum") for i in range(3)) / 3
    assert float(outcome_kl(p, q).mean()) == pytest.approx(float(expected))


def test_labels_of_comparison_sets_and_preferences() -> None:
    rows = [*ROWS, *[{"quality": 0.0, "share": share} for share in (0.7, 0.3, 1.0)]][:5]
    label = labels([*ROWS[:2], *rows[3:5]], 2)
    assert label[0].tolist()[1] == 1 and torch.isnan(label[0, 2:]).all() and torch.isnan(label.diagonal()).all()
    assert label[2, 3] == pytest.approx(0.7) and label[3, 2] == pytest.approx(0.3)


def exact_config(settings: dict, model: Path, output: Path, **more) -> RankerConfig:
    return RankerConfig(
        **{**settings, "model": str(model), "output_dir": str(output), "objective": "exact", "micro_batch": 4, **more}
    )


@pytest.mark.parametrize("objective", ["exact", "fidelity"])
def test_the_micro_batch_changes_nothing(objective: str, settings, warm_model: Path, tmp_path: Path) -> None:
    gradients = []
    for size in (4, 2):
        config = exact_config(settings, warm_model, tmp_path, objective=objective, micro_batch=size)
        trainer = ExactRankerTrainer(None, config, *prepare_data(config))
        rows = [trainer.train_dataset[i] for i in trainer.comparison_sampler(1, 1).comparison_sets()[0]]
        trainer.training_step(trainer.model, rows)
        gradients.append({name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-5, rtol=1e-3)


def test_training_raises_the_expected_fidelity(settings, warm_model: Path, tmp_path: Path) -> None:
    """All pictures in every step, so that the figures of two steps can be compared."""
    config = exact_config(
        settings,
        warm_model,
        tmp_path / "out",
        max_steps=12,
        learning_rate=5e-4,
        images_per_device=12,
        images_per_comparison=12,
        micro_batch=12,
        kl_weight=0.0,
        data=settings["data"][:1],
    )
    train(config)
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    fidelity = [entry["fidelity"] for entry in log if "fidelity" in entry]
    assert fidelity[-1] > fidelity[0] + 0.02


class Killed(Exception):
    """Stands for a run that dies."""


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise Killed


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 4], ids=["full", "lora"])
def test_a_killed_run_resumes_bit_by_bit(lora_rank: int, settings, warm_model: Path, tmp_path: Path) -> None:
    more = {"lora_rank": lora_rank, "save_steps": 2, "max_steps": 8, "cold_start_steps": 2, "kl_weight": 0.1}
    train(exact_config(settings, warm_model, tmp_path / "whole", **more))
    broken = exact_config(settings, warm_model, tmp_path / "broken", **more)
    with pytest.raises(Killed):
        train(broken, callbacks=[KillAt()])
    # A checkpoint that was cut off is passed over.
    (tmp_path / "broken/checkpoint-5").mkdir()
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-4"
    with pytest.warns(UserWarning, match="Passed over checkpoint-5: trainer_state.json is missing. Going on from che"):
        train(broken, resume=True)
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "broken"))
    started = load_file(warm_model / "model.safetensors")
    assert any(not torch.equal(expected[name], started[name]) for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_data_is_judged_before_weights_load(settings, rated: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("image,mos\n0.png,3\ngone.png,4\n")
    config = RankerConfig(
        **{**settings, "data": [str(tmp_path / "bad.csv")], "images": [str(rated)], "objective": "exact"},
        model=str(tmp_path / "no-such-model"),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(DataError, match=r"bad.csv, line 3: gone.png is not in"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_refused(settings, warm_model: Path, tmp_path: Path) -> None:
    config = exact_config(settings, warm_model, tmp_path, trainer={"fsdp": True})
    with pytest.raises((ConfigError, ValueError), match=r"FSDP|fsdp"):
        ExactRankerTrainer(None, config, *prepare_data(config))


def test_what_the_cold_start_teaches() -> None:
    class Rows:
        rows = [{"data_set": "a", "quality": q, "share": None} for q in (10.0, 30.0, 20.0, 20.0)] + [
            {"data_set": "b", "quality": 0.0, "share": share} for share in (0.75, 0.25)
        ]

    assert teaching_scores(Rows) == [1, 5, 3, 3, 4, 2]
    assert reply(3.999, False) == "<answer>4.00</answer>"
    assert reply(1.5, True) == "<think>The overall quality of this picture is bad.</think>\n<answer>1.50</answer>"
    assert "excellent" in reply(5.0, True)


def test_the_command_line(rated: Path, warm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [
        "train",
        "--data",
        str(rated / "noise.csv"),
        "--model",
        str(warm_model),
        "--preset",
        "nano",
        "-o",
        str(tmp_path / "out"),
        "--images-per-device",
        "4",
        "--images-per-comparison",
        "4",
        "--max-steps",
        "2",
        "--validation-fraction",
        "0.34",
        "--max-pixels",
        "3136",
        "--set",
        "learning_rate=0.001",
    ]
    assert main(command) == 0
    assert "VisualQualityR1Score(model=" in capsys.readouterr().out
    (result,) = QualityScorer(str(tmp_path / "out")).score([rated / "0.png"])
    assert 1 <= result.score <= 5
    assert main(command) == 1 and "holds one: resume it" in capsys.readouterr().err
    assert main(["train", "--resume", "-o", str(tmp_path / "out")]) == 0
    assert main(["train", "--resume", "-o", str(tmp_path / "nowhere")]) == 1
    assert "no run to resume" in capsys.readouterr().err
    assert main([*command[:3], "-o", str(tmp_path / "x"), "--set", "speed=9"]) == 1
    assert "Expected a setting of RankerConfig, but got 'speed'" in capsys.readouterr().err
