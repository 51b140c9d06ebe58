"""The teacher: opinions predicted from picture statistics by kernel ridge regression.

A tower from scratch learns the opinions of a few thousand pictures by heart before it has learnt what they are about.
A kernel machine over good statistics does not, and can say what it expects of every crop. It is fitted in folds by
picture, and each picture is judged by the machine that has not seen it, so that its answers are no memory of the
opinions.
"""

import torch
from torch import Tensor

WIDTH, RIDGE, LIMIT = 0.3, 0.3, 5.0
"""Kernel exp(-WIDTH * squared distance / features), ridge, and clip of the standardised statistics."""


class Standard:
    """Statistics in units of their spread over rated crops, clipped."""

    def __init__(self, table: Tensor) -> None:
        self.mean, self.std = table.mean(0), table.std(0, correction=0) + 1e-6

    def __call__(self, table: Tensor) -> Tensor:
        return ((table - self.mean) / self.std).clamp(-LIMIT, LIMIT)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-WIDTH * torch.cdist(a, b).square() / a.shape[1])


def kernel_ridge(inputs: Tensor, scores: Tensor, asked: Tensor) -> Tensor:
    """Fit scores (N,) on standardised inputs (N, F) and predict for `asked` (M, F): (M,)."""
    centre = scores.mean()
    gram = _kernel(inputs, inputs)
    gram.diagonal().add_(RIDGE)
    factor = torch.linalg.cholesky(gram)
    weights = torch.cholesky_solve((scores - centre)[:, None], factor)
    return centre + (_kernel(asked, inputs) @ weights).squeeze(1)


def cross_fitted(table: Tensor, scores: Tensor, picture: Tensor, folds: int = 5) -> Tensor:
    """What each crop's score is expected to be, from crops of other pictures only.

    Args:
        table: statistics (N, F) of the crops, unstandardised.
        scores: opinion score of each crop's picture, (N,).
        picture: number of each crop's picture, (N,).
    """
    inputs, out = Standard(table)(table), torch.empty_like(scores)
    for fold in range(folds):
        held = picture % folds == fold
        out[held] = kernel_ridge(inputs[~held], scores[~held], inputs[held])
    return out


def components(table: Tensor, kept: int = 160) -> tuple[Tensor, Tensor]:
    """Principal directions (F, kept) of a standardised table, each divided by the fourth root of its variance.

    A regression on whitened directions would spend itself on noise, one on plain directions on the first few.
    """
    covariance = table.T @ table / len(table)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    scaled = vectors / values.clamp(min=1e-6) ** 0.25
    return scaled / (table @ scaled).square().mean().sqrt(), values
