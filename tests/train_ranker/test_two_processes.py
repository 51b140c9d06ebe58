"""Two processes over gloo: comparison sets that span them, and runs that are killed for real and resumed."""

import json
import time
from pathlib import Path

import pytest
import torch

from launcher import PATIENCE, finish, kill, launch, weights
from vqr1_metric.train_ranker.reward import RankingReward

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def train_command(rated: Path, model: Path, output: Path, *more: str) -> list[str | Path]:
    settings = {"kl_weight": 0.1, "gradient_checkpointing": False, "max_new_tokens": 16, "lr_scheduler": "constant"}
    return [
        "-m",
        "vqr1_metric.train_ranker",
        "--data",
        rated / "noise.csv",
        "--model",
        model,
        "-o",
        output,
        "--no-thinking",
        "--validation-fraction",
        "0.34",
        "--max-pixels",
        "3136",
        "--learning-rate",
        "1e-3",
        "--num-generations",
        "3",
        "--micro-batch",
        "4",
        *more,
        *(part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")),
    ]


def test_rewards_over_both_processes_are_those_of_one(tmp_path: Path) -> None:
    scores = (1 + 4 * torch.rand(8, 3)).flatten().tolist()
    batch = {
        "completions": [f"<answer>{s:.2f}</answer>" if i != 7 else "no idea" for i, s in enumerate(scores)],
        "data_set": ["a"] * 12 + ["b"] * 12,
        "quality": [float(i // 3 * 7 % 5) for i in range(24)],
        "share": [None] * 24,
    }
    (tmp_path / "batch.json").write_text(json.dumps(batch))
    finish(launch(HERE / "reward_worker.py", tmp_path))
    found = [json.loads((tmp_path / f"rewards{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] + found[1] == RankingReward(4, 3)(**batch)
    assert found[0][7] is None


def test_a_global_comparison_set_trains_like_one_process(rated: Path, warm_model: Path, tmp_path: Path) -> None:
    common = ("--objective", "exact", "--max-steps", "2", "--images-per-comparison", "8", "--save-steps", "9")
    two = ("--images-per-device", "4", "--comparison-scope", "global")
    finish(launch(*train_command(rated, warm_model, tmp_path / "two", *common, *two)))
    finish(
        launch(*train_command(rated, warm_model, tmp_path / "one", *common, "--images-per-device", "8"), processes=1)
    )
    start, one, two = weights(warm_model), weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    # Adam's first steps are about the learning rate wherever the gradient is not zero, however small it is.
    assert moved > 1e-3 and apart < 0.05 * moved


@pytest.mark.parametrize("objective", ["sampled", "exact"])
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_killed_launch_resumes_bit_by_bit(
    objective: str, lora_rank: int, rated: Path, warm_model: Path, tmp_path: Path
) -> None:
    """SIGKILL to both processes as soon as the second checkpoint is there; an epoch is one step."""
    if objective == "sampled":
        pytest.importorskip("trl", minversion="1.16", reason="RL with sampled replies needs trl 1.16")
    more = (
        "--objective",
        objective,
        "--lora-rank",
        str(lora_rank),
        "--max-steps",
        "12",
        "--save-steps",
        "2",
        "--images-per-device",
        "4",
        "--images-per-comparison",
        "4",
        "--eval-steps",
        "5",
    )
    finish(launch(*train_command(rated, warm_model, tmp_path / "whole", *more)))
    command = train_command(rated, warm_model, tmp_path / "broken", *more)
    process = launch(*command)
    deadline = time.time() + PATIENCE
    while not (tmp_path / "broken/checkpoint-4/trainer_state.json").is_file() and time.time() < deadline:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)
    assert not (tmp_path / "broken/model.safetensors").exists()
    kill(process)
    finish(launch(*command, "--resume"))
    expected, found, start = weights(tmp_path / "whole"), weights(tmp_path / "broken"), weights(warm_model)
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
