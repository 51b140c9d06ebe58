"""Room for rounding, derived from the number format and never from what one processor gave."""

from typing import Any

import torch

from vqr1_metric.images import ImageLike
from vqr1_metric.scorer import QualityScorer

#: Scores lie in [1, 5].
SCORE_RANGE = 4.0
#: Roundings one after the other on the way from pixels to a score, at most, in the tiny models: about 14 products,
#: sums and norms in each of their 4 layers, and the readout.
ROUNDINGS = 64


def score_room(dtype: torch.dtype = torch.float32, roundings: int = ROUNDINGS) -> float:
    """Two orders of the same sums give scores that differ by at most this: every rounding in the same direction."""
    return SCORE_RANGE * torch.finfo(dtype).eps * roundings


def batch_room(folder: str, dtype: str, images: list[ImageLike], **settings: Any) -> float:
    """How far the scores of the same images may be apart in two batches.

    In float32 :func:`score_room`. That bound says nothing for formats so coarse as bfloat16: there it is the format's
    own error, the largest difference from the same model in float64. It comes from rounding the weights and the
    activations once; another order of the sums changes the roundings of the activations alone.
    """
    if dtype == "float32":
        return score_room()
    coarse, fine = (
        [result.score for result in QualityScorer(folder, dtype=name, device="cpu", **settings).score(images)]
        for name in (dtype, "float64")
    )
    return max(abs(a - b) for a, b in zip(coarse, fine, strict=True))


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference from a float64 reference, as a share of the reference's largest value."""
    return float((found.double() - reference.double()).abs().max() / reference.double().abs().max())
