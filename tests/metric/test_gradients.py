"""The differentiable functional: against finite differences, and what must not get a gradient."""

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from vqr1_metric import QualityScorer, VisualQualityR1Loss, visual_quality_r1_score
from vqr1_metric.images import ImageContractError, ImageError

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

STEP, TOLERANCE = 1e-4, 2e-9


@pytest.fixture
def scorer(tiny_qwen2_5_vl):
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float64")


@pytest.fixture
def exact(monkeypatch):
    """Keep float64 where transformers rounds a float64 model to float32: a difference of two scores would show it."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rope(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
        return q * cos + modeling.rotate_half(q) * sin, k * cos + modeling.rotate_half(k) * sin

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb_vision", rope)
    for name in dir(modeling):
        if name.endswith("RMSNorm"):
            monkeypatch.setattr(getattr(modeling, name), "forward", norm)


def pictures(*shape):
    # Away from 0 and 1, where pixels are clamped.
    return 0.1 + 0.8 * torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("size", [(56, 84), (61, 75)], ids=["as it is", "resized"])
def test_gradients_equal_finite_differences(scorer, size):
    images = pictures(2, 3, *size).requires_grad_()
    scores = visual_quality_r1_score(images, scorer, differentiable=True, reduction="none")
    assert scores.shape == (2,) and scores.dtype == torch.float64
    visual_quality_r1_score(images, scorer, differentiable=True).backward()
    gradient = images.grad.flatten()
    largest = gradient.abs().topk(3).indices.tolist()
    for index in [*largest, 7, images[0].numel() + 1234]:
        ends = []
        for sign in (1, -1):
            moved = images.detach().flatten().clone()
            moved[index] += sign * STEP
            ends.append(float(visual_quality_r1_score(moved.view_as(images), scorer, differentiable=True)))
        assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / (2 * STEP), abs=TOLERANCE)
    assert float(gradient.abs().max()) > 1e6 * TOLERANCE


def test_gradients_of_the_model_as_it_ships(scorer, request):
    """Its float32 roundings, which the test above takes out, change the gradient by rounding only."""
    gradients = []
    for _ in range(2):
        images = pictures(1, 3, 56, 84).requires_grad_()
        visual_quality_r1_score(images, scorer, differentiable=True).backward()
        gradients.append(images.grad)
        request.getfixturevalue("exact")
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert not torch.equal(*gradients)


def test_only_pixels_get_gradients(scorer):
    images = pictures(2, 3, 56, 56).requires_grad_()
    (-visual_quality_r1_score([images[0], images[1][:, :, :50]], scorer, differentiable=True)).backward()
    assert float(images.grad[0].abs().sum()) > 0 and float(images.grad[1, :, :, :50].abs().sum()) > 0
    assert float(images.grad[1, :, :, 50:].abs().sum()) == 0
    assert all(p.grad is None and not p.requires_grad for p in scorer.backend.model.parameters())


def test_value_equals_the_plain_call(scorer):
    images = pictures(2, 3, 60, 56).requires_grad_()
    plain = visual_quality_r1_score(images.detach(), scorer, reduction="none")
    graph = visual_quality_r1_score(images, scorer, differentiable=True, reduction="none")
    torch.testing.assert_close(plain, graph.detach().float(), atol=1e-6, rtol=0)
    assert graph.requires_grad and not plain.requires_grad
    with torch.no_grad():
        assert not visual_quality_r1_score(images, scorer, differentiable=True).requires_grad


def test_weights_loaded_in_inference_mode_still_pass_gradients(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float64", attn_implementation="eager")
    images = pictures(1, 3, 56, 56)
    assert not scorer.loaded
    with torch.inference_mode():
        scorer.score(images)
    visual_quality_r1_score(images.requires_grad_(), scorer, differentiable=True).backward()
    assert float(images.grad.abs().sum()) > 0
    scorer.unload()


def test_a_loss_trains_what_made_the_pictures(scorer):
    pixels = pictures(1, 3, 56, 56)
    bias = torch.zeros(1, 3, 56, 56, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([bias], lr=0.2)
    scores = []
    for _ in range(4):
        optimizer.zero_grad()
        score = visual_quality_r1_score((pixels + bias).clamp(0, 1), scorer, differentiable=True)
        scores.append(float(score.detach()))
        (-score).backward()
        optimizer.step()
    assert scores == sorted(scores) and scores[-1] > scores[0]


def test_the_loss_is_what_the_score_lacks(scorer):
    images = pictures(2, 3, 56, 56).requires_grad_()
    loss = VisualQualityR1Loss(scorer)
    value = loss(images, images)
    score = visual_quality_r1_score(images, scorer, differentiable=True)
    assert value.shape == () and 0 <= value <= 4 and float(value.detach()) == pytest.approx(5 - float(score.detach()))
    value.backward()
    gradient, images.grad = images.grad, None
    (-score).backward()
    torch.testing.assert_close(gradient, images.grad, atol=1e-12, rtol=0)
    assert list(loss.parameters()) == [] and VisualQualityR1Loss(scorer, "none")(images).shape == (2,)
    with pytest.raises(ImageContractError, match="clamp"):
        loss(images * 1.5)
    assert VisualQualityR1Loss(scorer, clamp=True)(images * 1.5).isfinite()


def test_bad_pictures_and_other_modes_raise(scorer, tiny_qwen2_5_vl):
    bad = pictures(2, 3, 56, 56)
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ImageError, match="image 1"):
        visual_quality_r1_score(bad, scorer, differentiable=True)
    with pytest.raises(ImageError, match="at least one picture"):
        visual_quality_r1_score([], scorer, differentiable=True)
    thinking = QualityScorer(str(tiny_qwen2_5_vl), "think", device="cpu", dtype="float64")
    with pytest.raises(ValueError, match="mode='score'"):
        visual_quality_r1_score(bad[:1], thinking, differentiable=True)
