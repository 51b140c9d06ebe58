"""Rewards for training loops of picture generators: `vqr1_reward`, in the shape that Flow-GRPO asks for.

A reward that carries gradients to the pixels (ReFL, DRaFT) needs no adapter:
``scorer.distributions(images, differentiable=True).mean``; see ``examples/reward_backprop.py``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vqr1_metric.ensemble import Ensemble
from vqr1_metric.images import ImageError
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

logger = logging.getLogger(__name__)

Reward = Callable[[Any, Sequence[str] | None, Sequence[dict[str, Any]] | None], tuple[np.ndarray, dict[str, Any]]]


def vqr1_reward(
    device: str | torch.device | None = None,
    model: str = DEFAULT_MODEL,
    *,
    scorer: QualityScorer | Ensemble | None = None,
    risk: float = 0.0,
    alignment: Literal["product", "rank", "threshold"] | None = None,
    least_alignment: float = 0.5,
    alarm: DriftAlarm | None = None,
    **options: Any,
) -> Reward:
    """A deterministic quality reward, ``fn(images, prompts, metadata) -> (scores, {})``, as Flow-GRPO has them.

    ``images`` are a tensor ``(N, C, H, W)`` floating in [0, 1] or an array ``(N, H, W, C)`` of uint8; floats are
    rounded to 8 bits first, so that both forms of a picture get the same reward. ``prompts`` are looked at with
    ``alignment``, or where the scorer's question asks about them; ``metadata`` never. ``scores`` is a float32 array
    ``(N,)``: the expected score in [1, 5], less ``risk`` times its standard deviation. The weights load at the first
    call.

    Quality alone forgets the prompt: a generator that is trained on it may draw the same good picture for every one.

    Args:
        device: where the scoring model runs; the pictures may be elsewhere.
        model: Hugging Face Hub name, local folder, or ``"nano"``.
        scorer: a ready scorer, or an ensemble, instead.
        risk: standard deviations to take off, at least 0: a generator that is optimised goes where the judge is unsure.
        alignment: ask in the same pass whether each picture shows its prompt (``P(yes)``, see
            :data:`vqr1_metric.protocol.QUESTIONS`), and combine: ``"product"`` is the quality's place in [0, 1] times
            the alignment; ``"rank"`` the mean of both ranks among the pictures of the call, in [0, 1]; ``"threshold"``
            the quality, and the lowest score for a picture below ``least_alignment``.
        least_alignment: see above.
        alarm: watches the scores, see :class:`DriftAlarm`; None for one of its own.
        options: of :class:`~vqr1_metric.scorer.QualityScorer`, such as ``dtype`` and ``batch_tokens``.

    Raises:
        ImageError: by ``fn``, a ValueError, for pictures of another form, or of which one has no score: a reward is
            never invented, and NaN would spoil the advantages of its whole group.
        ValueError: by ``fn``, without prompts where ``alignment`` needs them.
    """
    if scorer is None:
        scorer = QualityScorer(model, device=device, **options)
    elif options or device is not None or model != DEFAULT_MODEL:
        raise ValueError("Expected a scorer, or device, model and options to make one, but got both.")
    if not isinstance(scorer, Ensemble) and scorer.mode != "score":
        raise ValueError(f'Expected a scorer with mode="score", which is deterministic, but got {scorer.mode!r}.')
    if not 0 <= risk < float("inf"):
        raise ValueError(f"Expected a risk of at least 0, but got {risk}.")
    if alignment not in (None, "product", "rank", "threshold"):
        raise ValueError(f"Expected alignment None, 'product', 'rank' or 'threshold', but got {alignment!r}.")
    if alignment is not None and isinstance(scorer, Ensemble):
        raise ValueError("Expected one scorer with alignment, but got an ensemble.")
    watch = alarm or DriftAlarm()

    def reward(
        images: Tensor | np.ndarray,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        shown = None
        if alignment is None or isinstance(scorer, Ensemble):
            results: Sequence[ImageScore] = scorer.score(_as_bytes(images), prompts=prompts, on_error="raise")
        else:
            if prompts is None or isinstance(prompts, str):
                raise ValueError("Expected a prompt for each picture, since alignment is asked for.")
            answers = scorer.ask(_as_bytes(images), [scorer.question, "alignment"], prompts=list(prompts))
            results = [answer[scorer.question.name] for answer in answers]
            shown = np.array([answer["alignment"].score for answer in answers])
        for result in results:
            if result.error is not None:
                raise ImageError(f"{result.name}: {result.error}")
        watch.see(results)
        quality = np.array([result.score - risk * result.std for result in results])
        if shown is not None and not isinstance(scorer, Ensemble):
            low, high = scorer.question.values[0], scorer.question.values[-1]
            quality = _combined(alignment, quality, shown, low, high, least_alignment)
        return quality.astype(np.float32), {}

    return reward


def _combined(
    how: str | None, quality: np.ndarray, shown: np.ndarray, low: float, high: float, least: float
) -> np.ndarray:
    if how == "product":
        combined: np.ndarray = ((quality - low) / (high - low)).clip(0, None) * shown
    elif how == "threshold":
        combined = np.where(shown >= least, quality, low)
    else:
        combined = (_ranks(quality) + _ranks(shown)) / 2
    return combined


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 for the lowest to 1 for the highest; equals share the mean of theirs; .5 for one value."""
    if len(values) < 2:
        return np.full(len(values), 0.5)
    below: np.ndarray = (values[:, None] > values[None]).sum(1) + 0.5 * ((values[:, None] == values[None]).sum(1) - 1)
    ranks: np.ndarray = below / (len(values) - 1)
    return ranks


class DriftAlarm:
    """Says once, in the log, when an optimised generator may be fooling its judge.

    That is, when the mean score of the last images has left the range of the first ones, while the judge's spread or
    its coverage has fallen: scores that no image had at the start, of which the judge is surer than before, or for
    which less of its probability is a score at all.

    Args:
        images: how many images the start, and the last ones, are.
        spread, coverage: the mean standard deviation and the mean coverage have fallen when they are below this share
            of what they were. The defaults are such that gradient ascent on nano's pixels sets the alarm off (see
            docs/questions.md: .76 and .95 of what they were).
    """

    def __init__(self, images: int = 64, *, spread: float = 0.85, coverage: float = 0.95) -> None:
        if images < 2:
            raise ValueError(f"Expected at least 2 images, but got {images}.")
        self._images, self._spread, self._coverage = images, spread, coverage
        self._first: list[tuple[float, float, float]] = []
        self._last: deque[tuple[float, float, float]] = deque(maxlen=images)
        self.message: str | None = None

    def see(self, results: Sequence[ImageScore]) -> None:
        """Look at the results of another batch; those without a score are passed over."""
        for result in results:
            if result.error is not None:
                continue
            figures = (result.score, result.std, result.coverage)
            if len(self._first) < self._images:
                self._first.append(figures)
            else:
                self._last.append(figures)
        if self.message is not None or len(self._last) < self._images:
            return
        scores = [score for score, _, _ in self._first]
        score, std, coverage = np.mean(self._last, axis=0)
        _, first_std, first_coverage = np.mean(self._first, axis=0)
        fallen = std < self._spread * first_std or coverage < self._coverage * first_coverage
        if fallen and not min(scores) <= score <= max(scores):
            self.message = (
                f"The mean score of the last {self._images} images, {score:.2f}, lies outside the range of the first "
                f"ones, {min(scores):.2f} to {max(scores):.2f}, while the judge's standard deviation went from "
                f"{first_std:.2f} to {std:.2f} and its coverage from {first_coverage:.2f} to {coverage:.2f}: the "
                "generator may be fooling the judge. Look at the images, ask another judge, or raise risk."
            )
            logger.warning(self.message)


def _as_bytes(images: Tensor | np.ndarray) -> Tensor:
    """Pictures as uint8, ``(N, C, H, W)``."""
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] == 3:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point():
        images = images.detach().float()
        low, high = images.aminmax()
        if not (low >= -1e-2 and high <= 1 + 1e-2):  # also NaN; half-precision decoders leave the range by a little
            raise ImageError(f"Expected pictures in [0, 1], but got values from {low:.4g} to {high:.4g}.")
        return (images * 255).round().clamp(0, 255).to(torch.uint8)
    kind = f"{type(images).__name__} of {getattr(images, 'dtype', '?')} and shape {tuple(getattr(images, 'shape', ()))}"
    raise ImageError(f"Expected a float tensor (N, 3, H, W) or a uint8 array (N, H, W, 3), but got a {kind}.")
