"""Reward, advantage, loss and gradient against golden numbers of the published formulas (see make_rl2r.py)."""

import json
from pathlib import Path

import pytest
import torch

from vqr1_metric.functional.reward import ranking_reward
from vqr1_metric.train_ranker.reward import RankingReward

GOLDEN = json.loads(Path(__file__).with_name("rl2r.json").read_text())
CASES = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"seed{case['seed']}")


@CASES
def test_reward(case: dict) -> None:
    scores, mos = torch.tensor(case["scores"], dtype=torch.float64), torch.tensor(case["mos"], dtype=torch.float64)
    expected = torch.tensor(case["rewards"], dtype=torch.float64)
    torch.testing.assert_close(ranking_reward(scores, mos), expected, atol=1e-12, rtol=0)
    k = scores.shape[1]
    found = RankingReward(len(mos), k)(
        completions=[f"<answer>{score}</answer>" for score in scores.flatten().tolist()],
        data_set=["a"] * len(mos) * k,
        quality=mos.repeat_interleave(k).tolist(),
        share=[None] * len(mos) * k,
    )
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.flatten(), atol=1e-12, rtol=0)
