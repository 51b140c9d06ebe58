"""The Flow-GRPO reward: both picture forms, deterministic, never invented."""

import numpy as np
import pytest
import torch

from vqr1_metric.images import ImageError
from vqr1_metric.integrations.rewards import vqr1_reward
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*was this model trained:UserWarning")


@pytest.fixture(scope="module")
def scorer(tiny_qwen2_5_vl):
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu")


@pytest.fixture
def pictures():
    """Four pictures as Flow-GRPO has them: a tensor in [0, 1] whose values lie between those of 8 bits."""
    return torch.rand(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_both_forms_give_the_scores_of_the_scorer(tiny_qwen2_5_vl, scorer, pictures):
    reward = vqr1_reward("cpu", str(tiny_qwen2_5_vl))
    scores, extra = reward(pictures, ["a cat"] * 4, [{}] * 4)
    array = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert extra == {}
    assert scores.shape == (4,)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, reward(array, None, None)[0])
    assert np.array_equal(scores, np.float32([result.score for result in scorer.score(array)]))


def test_it_is_deterministic_and_takes_half_precision(scorer, pictures):
    reward = vqr1_reward(scorer=scorer)
    first = reward(pictures)[0]
    torch.manual_seed(1)
    assert np.array_equal(first, reward(pictures)[0])
    assert len(set(first.tolist())) == 4
    half = pictures.to(torch.bfloat16)
    assert np.array_equal(reward(half)[0], reward(half.float())[0])
    assert reward(pictures.requires_grad_())[0].shape == (4,)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(3, 8, 8), "float tensor"),
        (torch.zeros(2, 8, 8, 3), "float tensor"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "float tensor"),
        (np.zeros((2, 8, 8, 3), dtype=np.float32), "uint8 array"),
        ([1, 2], "float tensor"),
        (torch.full((2, 3, 8, 8), -1.0), r"in \[0, 1\]"),
        (torch.full((2, 3, 8, 8), float("nan")), r"in \[0, 1\]"),
    ],
)
def test_other_pictures_are_refused(scorer, images, match):
    with pytest.raises(ImageError, match=match):
        vqr1_reward(scorer=scorer)(images)


def test_arguments(scorer):
    with pytest.raises(ValueError, match="but got both"):
        vqr1_reward("cpu", scorer=scorer)
    with pytest.raises(ValueError, match="deterministic"):
        vqr1_reward(scorer=scorer.replace(mode="sample"))
