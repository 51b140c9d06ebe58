"""The Flow-GRPO reward: both picture forms, deterministic, never invented."""

import numpy as np
import pytest
import torch

from vqr1_metric.ensemble import Ensemble
from vqr1_metric.functional import ScoreDistribution
from vqr1_metric.images import ImageError
from vqr1_metric.integrations.rewards import DriftAlarm, vqr1_reward
from vqr1_metric.results import ImageScore
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


def test_risk_takes_off_standard_deviations(scorer, pictures):
    results = scorer.score((pictures * 255).round().to(torch.uint8))
    expected = [result.score - 1.5 * result.std for result in results]
    assert vqr1_reward(scorer=scorer, risk=1.5)(pictures)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_quality_and_alignment_of_one_encoding(scorer, pictures, monkeypatch):
    prompts = ["a lake", "a red bicycle at night", "a dog", "noise"]
    towers = []
    visual = scorer.backend.model.model.visual
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda *a, **k: towers.append(len(k["grid_thw"])) or forward(*a, **k))
    rewards = {how: vqr1_reward(scorer=scorer, alignment=how)(pictures, prompts)[0] for how in ("product", "rank")}
    assert sum(towers) == 8  # each picture once a call
    images = (pictures * 255).round().to(torch.uint8)
    answers = scorer.ask(images, [scorer.question, "alignment"], prompts=prompts)
    quality = np.array([answer["visualquality-r1"].score for answer in answers])
    shown = np.array([answer["alignment"].score for answer in answers])
    assert rewards["product"] == pytest.approx((quality - 1) / 4 * shown, rel=1e-4)
    ranks = [np.argsort(np.argsort(values)) / 3 for values in (quality, shown)]
    assert rewards["rank"] == pytest.approx(sum(ranks) / 2)
    least = float(np.median(shown))
    reward = vqr1_reward(scorer=scorer, alignment="threshold", least_alignment=least)(pictures, prompts)[0]
    assert reward == pytest.approx(np.where(shown >= least, quality, 1.0), abs=1e-4) and 0 < (reward == 1).sum() < 4
    with pytest.raises(ValueError, match="a prompt for each picture"):
        vqr1_reward(scorer=scorer, alignment="rank")(pictures)


def result(score, std, coverage=1.0):
    """A result with about this mean and spread."""
    grid = torch.linspace(1, 5, 401)
    probabilities = torch.softmax(-0.5 * ((grid - score) / std) ** 2, 0)
    return ImageScore.of("x", ScoreDistribution(probabilities, torch.tensor(coverage), torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("later", "alarmed"),
    [
        ((4.5, 0.1), True),  # beyond all that was seen, and surer
        ((4.5, 0.4, 0.5), True),  # beyond, and less of it a score
        ((4.2, 0.45), False),  # better, and as unsure as before
        ((3.2, 0.1), False),  # surer, but within what was seen
        ((1.2, 0.1), True),
    ],
)
def test_alarm_when_the_judge_may_be_fooled(later, alarmed, caplog):
    alarm = DriftAlarm(images=4)
    alarm.see([result(score, 0.4) for score in (2.5, 3.0, 3.5, 3.0)])
    for _ in range(3):
        alarm.see([result(*later), result(*later)])
    assert (alarm.message is not None) == alarmed
    assert sum("fooling the judge" in record.message for record in caplog.records) == alarmed  # once


def test_a_reward_of_several_judges(scorer, tiny_qwen2_vl, pictures):
    other = QualityScorer(str(tiny_qwen2_vl), device="cpu")
    judges = Ensemble([scorer, other])
    images = (pictures * 255).round().to(torch.uint8)
    expected = [one.score - one.std for one in judges.score(images)]
    assert vqr1_reward(scorer=judges, risk=1)(pictures)[0].tolist() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="one scorer with alignment"):
        vqr1_reward(scorer=judges, alignment="rank")


def test_arguments(scorer):
    with pytest.raises(ValueError, match="risk of at least 0"):
        vqr1_reward(scorer=scorer, risk=-1)
    with pytest.raises(ValueError, match="Expected alignment"):
        vqr1_reward(scorer=scorer, alignment="sum")
    with pytest.raises(ValueError, match="but got both"):
        vqr1_reward("cpu", scorer=scorer)
    with pytest.raises(ValueError, match="deterministic"):
        vqr1_reward(scorer=scorer.replace(mode="sample"))
