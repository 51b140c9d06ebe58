"""The score as a function, `visual_quality_r1_score`, and as a loss, `VisualQualityR1Loss`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqr1_metric._warnings import warn_caller
from vqr1_metric.functional.distribution import MAX_SCORE
from vqr1_metric.images import DataRange, ImageError, Images, split_images
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import QualityScorer, warn_if_detached

Reduction = Literal["mean", "none"]


def visual_quality_r1_score(
    images: Images,
    scorer: QualityScorer | str,
    differentiable: bool = False,
    reduction: Reduction | None = "mean",
    *,
    on_error: Literal["nan", "raise"] = "nan",
    data_range: DataRange | None = None,
    clamp: bool | None = None,
) -> Tensor:
    """Quality of pictures on a scale of 1 to 5, as :class:`VisualQualityR1Score` computes it.

    Args:
        images: as for :class:`VisualQualityR1Score`.
        scorer: the model and how to use it; keep one and pass it to every call. Or the name of a model, such as
            ``"nano"``.
        differentiable: return expected scores with gradients to floating pixels, for a loss or reward to be
            *maximised* (``loss = -visual_quality_r1_score(...)``). The judge's weights are frozen and get no ``.grad``;
            under ``torch.no_grad()`` there is no graph. Needs a scorer with ``mode="score"``. A bad picture raises,
            since NaN would ruin the weights in training.
        reduction: ``"mean"`` over the pictures that have a score, or ``"none"``.
        on_error: ``"nan"`` or ``"raise"``, for a picture that cannot be read.
        data_range, clamp: as for :class:`VisualQualityR1Score`.

    Returns:
        Tensor of shape ``()``, or ``(B,)`` for ``"none"``, in [1, 5] or NaN; on the device of the first picture that is
        a tensor, otherwise on the CPU; float32 (float64 if differentiable and the model is float64).

    Raises:
        ImageContractError: for tensors and arrays of another form or range, or what is no picture.
        ImageError: for a bad or missing picture, if ``differentiable`` or ``on_error="raise"``.
    """
    reduction = checked_reduction(reduction)
    scorer = _named_scorer(scorer) if isinstance(scorer, str) else checked_scorer(scorer)
    if data_range is not None or clamp is not None:
        scorer = scorer.replace(data_range=data_range, clamp=clamp)
    split = split_images(images)
    device = next((image.device for image in split if isinstance(image, Tensor)), torch.device("cpu"))
    if not differentiable:
        warn_if_detached(split, differentiable)
        with torch.inference_mode(False), torch.no_grad():
            results = scorer.score(split, on_error=on_error)
            scores = scores_of(results, device)
            if reduction == "none":
                return scores
            failed = [result for result in results if result.error is not None]
            if failed:
                warn_caller(f"{failures(failed, len(results))} reduction='none' returns them as NaN.")
            elif not results:
                warn_caller("There are no pictures, so the mean is NaN.")
            return scores.nanmean()
    if scorer.mode != "score":
        raise ValueError(f"Expected a scorer with mode='score' for differentiable=True, but got mode={scorer.mode!r}.")
    if not split:
        raise ImageError("Expected at least one picture, but got none.")
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        means = scorer.distributions(split, differentiable=True).mean.to(device)
        return means if reduction == "none" else means.mean()


class VisualQualityR1Loss(nn.Module):
    """A loss to be minimised: 5 minus the expected score, in [0, 4], with gradients to the pixels.

    Alone it is no goal: a network finds pictures that the judge likes and people do not. Use it with a small weight
    beside a loss that holds the content, and look at the pictures. The judge is no part of ``parameters()``.

    Args:
        scorer: a :class:`~vqr1_metric.scorer.QualityScorer` with ``mode="score"``, or the name of a model.
        reduction: ``"mean"`` or ``"none"``.
        data_range, clamp: as for :class:`~vqr1_metric.scorer.QualityScorer`. Where pixels are clamped there is no
            gradient.

    Example:
        >>> loss = VisualQualityR1Loss("nano", clamp=True)  # doctest: +SKIP
        >>> (l1 + 0.01 * loss(enlarged)).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        scorer: QualityScorer | str,
        reduction: Reduction | None = "mean",
        *,
        data_range: DataRange | None = None,
        clamp: bool | None = None,
    ) -> None:
        super().__init__()
        named = _named_scorer(scorer) if isinstance(scorer, str) else checked_scorer(scorer)
        self.scorer = named.replace(data_range=data_range, clamp=clamp)
        self.reduction = checked_reduction(reduction)

    def forward(self, images: Images, *_: Any) -> Tensor:
        """The loss of pictures, shape ``()`` or ``(B,)``; further arguments, such as a target, are ignored."""
        scores = visual_quality_r1_score(images, self.scorer, differentiable=True, reduction=self.reduction)
        return MAX_SCORE - scores


@functools.lru_cache(maxsize=8)
def _named_scorer(model: str) -> QualityScorer:
    return QualityScorer(model)


def scores_of(results: Sequence[ImageScore], device: torch.device) -> Tensor:
    """Scores ``(N,)``, float32, NaN where there is none."""
    return torch.tensor([result.score for result in results], dtype=torch.float32, device=device)


def failures(failed: Sequence[ImageScore], total: int) -> str:
    """How many of how many have no score, and why the first has none."""
    first = failed[0]
    error = first.error or ""
    reason = error if error.startswith(first.name) else f"{first.name}: {error}"
    more = ", ..." if len(failed) > 1 else ""
    return f"{len(failed)} of {total} pictures have no score and are left out of the mean: {reason}{more}."


def checked_reduction(reduction: str | None) -> Reduction:
    """``reduction``, or a ValueError."""
    if reduction == "mean":
        return "mean"
    if reduction in ("none", None):
        return "none"
    raise ValueError(f"Expected reduction to be 'mean' or 'none', but got {reduction!r}.")


def checked_scorer(scorer: QualityScorer) -> QualityScorer:
    """``scorer``, or a ValueError."""
    if not isinstance(scorer, QualityScorer):
        raise ValueError(f"Expected a QualityScorer, such as QualityScorer('nano'), but got {scorer!r}.")
    return scorer
