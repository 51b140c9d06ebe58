"""Several judges as one, on real tiny models."""

import math

import pytest
import torch

from vqr1_metric.ensemble import Ensemble
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


def test_the_mixture_of_two_judges(tiny_qwen2_5_vl, tiny_qwen2_vl, tmp_path):
    images = torch.rand(3, 3, 56, 84)
    scorers = [QualityScorer(str(model), device="cpu") for model in (tiny_qwen2_5_vl, tiny_qwen2_vl)]
    judges = Ensemble(scorers)
    results = judges.score(images)
    for result, a, b in zip(results, *(scorer.score(images) for scorer in scorers), strict=True):
        both = torch.stack([one.distribution.probabilities.double() for one in (a, b)]).mean(0)
        torch.testing.assert_close(result.distribution.probabilities, both, check_dtype=False)
        assert result.score == pytest.approx((a.score + b.score) / 2, abs=1e-5)
        assert result.disagreement == pytest.approx(abs(a.score - b.score) / 2, abs=1e-5) and result.disagreement > 0
        within = (a.std**2 + b.std**2) / 2
        assert result.std**2 == pytest.approx(within + result.disagreement**2, rel=1e-3)  # law of total variance
        assert [member.score for member in result.members] == [a.score, b.score]
    assert [r.score for r in judges.stream(iter(images))] == pytest.approx([r.score for r in results], abs=1e-5)
    assert judges.distributions(images).mean.tolist() == pytest.approx([r.score for r in results], abs=1e-4)
    assert judges.compare(images[0], images[1]).winner in ("a", "b", "tie") and len(judges.rank(images)) == 3
    assert judges.fingerprint == Ensemble(scorers[::-1]).fingerprint != scorers[0].fingerprint
    pixels = images.clone().requires_grad_()
    judges.distributions(pixels, differentiable=True).mean.sum().backward()
    expected = torch.zeros_like(images)
    for scorer in scorers:
        alone = images.clone().requires_grad_()
        scorer.distributions(alone, differentiable=True).mean.sum().backward()
        expected += alone.grad / 2
    torch.testing.assert_close(pixels.grad, expected, atol=1e-5, rtol=1e-3)
    bad = judges.score([images[0], tmp_path / "missing.png"])[1]
    assert math.isnan(bad.score) and math.isnan(bad.disagreement) and "no such file" in bad.error


def test_judges_that_do_not_fit(tiny_qwen2_5_vl):
    name = str(tiny_qwen2_5_vl)
    with pytest.raises(ValueError, match="at least two scorers"):
        Ensemble([QualityScorer(name)])
    with pytest.raises(ValueError, match="same values"):
        Ensemble([QualityScorer(name), QualityScorer(name, question="levels")])
