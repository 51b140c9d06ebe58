"""Ways to train that only a whole run shows to work together: thinking, preferences beside scores, other losses."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqr1_metric import QualityScorer
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("trl_trainer"),
]


def log_of(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_thinking_from_the_cold_start_to_the_scorer(
    settings: dict, warm_model: Path, rated: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    changed = {
        "thinking": True,
        "max_steps": 2,
        "cold_start_steps": 60,
        "cold_start_learning_rate": 3e-3,
        "max_new_tokens": 60,
        "validation_fraction": 0.34,
        "learning_rate": 1e-4,
    }
    train(RankerConfig(**{**settings, **changed}, model=str(warm_model), output_dir=str(output)))
    replies = [json.loads(line) for line in (output / "replies.jsonl").read_text().splitlines()]
    reasoned = [row for row in replies if row["reply"].startswith("<think>The overall quality of this picture is")]
    assert len(reasoned) > 0.5 * len(replies)
    assert any(row["score"] is not None and row["reward"] is not None for row in reasoned)
    log = log_of(output)
    (step, *_) = (entry for entry in log if "rewards/format/mean" in entry)
    assert step["rewards/format/mean"] > 0.5 and step["readable"] > 0.5
    (validated,) = (entry for entry in log if "eval_readable" in entry)
    assert validated["step"] == 2 and validated["eval_readable"] > 0.5  # by sampled reasoning, as a scorer would
    scorer = QualityScorer(str(output), mode="think", num_samples=2, max_new_tokens=60, max_pixels=56 * 56)
    (result,) = scorer.score([rated / "0.png"])
    assert 1 <= result.score <= 5


@pytest.mark.parametrize("objective", ["sampled", "exact"])
def test_preferences_train_beside_scores(
    objective: str, settings: dict, rated: Path, warm_model: Path, tmp_path: Path
) -> None:
    votes = tmp_path / "votes.csv"
    pairs = [f"{i}.png,{i + 2}.png,{5 - i % 3},{i % 3}" for i in range(0, 22, 2)]
    votes.write_text("\n".join(["a,b,votes_a,votes_b", *pairs]) + "\n")
    changed = {
        "data": [str(rated / "noise.csv"), str(votes)],
        "images": [str(rated)],
        "objective": objective,
        "max_steps": 4,
        "validation_fraction": 0.3,
        "micro_batch": 12 if objective == "sampled" else 4,
    }
    output = train(RankerConfig(**{**settings, **changed}, model=str(warm_model), output_dir=str(tmp_path / "out")))
    (validated,) = (entry for entry in log_of(output) if "eval_readable" in entry)
    assert 0 <= validated["eval_pairs_votes"] <= 1 and -1 <= validated["eval_srcc_noise"] <= 1
    fidelities = [entry["fidelity"] for entry in log_of(output) if "fidelity" in entry]
    assert len(fidelities) == 4 and all(0 < value < 1.01 for value in fidelities)
    if objective == "sampled":
        shown = [json.loads(line)["data_set"] for line in (output / "replies.jsonl").read_text().splitlines()]
        assert set(shown) == {"noise", "votes"}
        assert all(len(set(shown[i : i + 12])) == 1 for i in range(0, len(shown), 12))  # never compared


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "dr_grpo", "scale_rewards": "none"},
        {"loss": "dapo", "drop_zero_spread": True},
        {"importance_sampling": "sequence", "num_iterations": 2},
    ],
    ids=["dr_grpo", "dapo", "gspo"],
)
def test_other_losses_move_the_weights(changed: dict, settings: dict, warm_model: Path, tmp_path: Path) -> None:
    common = {**settings, "max_steps": 2, "save_steps": 100, "log_replies": False}
    output = train(RankerConfig(**{**common, **changed}, model=str(warm_model), output_dir=str(tmp_path / "out")))
    steps = [entry for entry in log_of(output) if "grad_norm" in entry]
    assert len(steps) == 2 and all(math.isfinite(entry["grad_norm"]) for entry in steps)
    assert max(entry["grad_norm"] for entry in steps) > 0
    before, after = load_file(warm_model / "model.safetensors"), load_file(output / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
