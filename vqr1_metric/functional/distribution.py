"""A probability distribution over what a reply can answer: the 401 scores 1.00, 1.01, ... 5.00, or other answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_SCORE = 1.0
MAX_SCORE = 5.0
STEPS_PER_UNIT = 100  # the question asks for "a float between 1 and 5, rounded to two decimal places"
GRID_SIZE = int((MAX_SCORE - MIN_SCORE) * STEPS_PER_UNIT) + 1


def score_grid(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scores 1.00, 1.01, ... 5.00.

    Returns:
        Tensor of shape ``(401,)``.
    """
    steps = torch.arange(GRID_SIZE, device=device, dtype=torch.float64)
    return (MIN_SCORE + steps / STEPS_PER_UNIT).to(dtype)


def is_on_score_grid(values: Sequence[float]) -> bool:
    """Are all of these among the scores 1.00, 1.01, ... 5.00?"""
    steps = [(value - MIN_SCORE) * STEPS_PER_UNIT for value in values]
    return all(abs(step - round(step)) < 1e-9 and 0 <= round(step) < GRID_SIZE for step in steps)


@dataclass(frozen=True)
class ScoreDistribution:
    """Score distributions of one picture (no leading dimension) or of a batch (leading dimension N).

    The scores are the grid 1.00, 1.01, ... 5.00 unless ``values`` holds others, those of the answers to another
    question.

    Args:
        probabilities: shape ``(..., 401)``, non-negative, summing to 1 over the last dimension: the probability of
            every score of the grid, *given* that the reply states a score of the grammar. A row of NaN means "no
            score".
        coverage: shape ``(...)``, in [0, 1]: the probability mass inside the grammar, given the answer tag. The mass
            outside (words, 5.01 to 5.99, unusual spellings) is left out of ``probabilities``, never spread over them.
        tag_probability: shape ``(...)``, in [0, 1]: the probability that the model opens its reply with ``<answer>``.
        values: the score of each of N other answers, in increasing order; then ``probabilities`` is ``(..., N)``.
        answers: their texts, in the order of ``values``.

    Both reliabilities default to 1.

    Example:
        >>> dist = ScoreDistribution.from_samples(torch.tensor([3.0, 4.0]))
        >>> dist.mean
        tensor(3.5000)
    """

    probabilities: Tensor
    coverage: Tensor = None  # type: ignore[assignment]  # ones, filled in below
    tag_probability: Tensor = None  # type: ignore[assignment]
    values: tuple[float, ...] | None = None
    answers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.probabilities.shape
        size = GRID_SIZE if self.values is None else len(self.values)
        if not shape or shape[-1] != size:
            raise ValueError(f"Expected probabilities of shape (..., {size}), but got {tuple(shape)}.")
        if self.values is not None and list(self.values) != sorted(set(self.values)):
            raise ValueError(f"Expected values in increasing order, each once, but got {self.values}.")
        if self.answers is not None and len(self.answers) != size:
            raise ValueError(f"Expected {size} answers, one for each value, but got {len(self.answers)}.")
        for name in ("coverage", "tag_probability"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, self.probabilities.new_ones(shape[:-1]))
            elif value.shape != shape[:-1]:
                raise ValueError(f"Expected {name} of shape {tuple(shape[:-1])}, but got {tuple(value.shape)}.")

    @classmethod
    def from_log_probabilities(
        cls,
        log_probabilities: Tensor,
        tag_probability: Tensor | None = None,
        values: tuple[float, ...] | None = None,
        answers: tuple[str, ...] | None = None,
    ) -> ScoreDistribution:
        """From the log-probability of every score given the tag, shape ``(..., 401)`` or ``(..., N)``, not normalised.

        Their sum is the coverage. Normalising in log space keeps a distribution well defined, and differentiable,
        however little mass lies inside the grammar.
        """
        log_coverage = torch.logsumexp(log_probabilities, dim=-1)
        probabilities = (log_probabilities - log_coverage.unsqueeze(-1)).exp()
        tagged = log_coverage.new_ones(log_coverage.shape) if tag_probability is None else tag_probability
        return cls(probabilities, log_coverage.exp(), tagged, values, answers)

    @classmethod
    def from_samples(cls, scores: Tensor) -> ScoreDistribution:
        """The empirical distribution of K sampled scores, shape ``(..., K)``, NaN where a reply held no score.

        A score between two grid points is split linearly between them, so that the mean stays exact. NaN scores are
        left out and lower ``coverage``, the share of readable replies; a row without a readable reply is all NaN.
        """
        readable = torch.isfinite(scores)
        if bool((readable & ((scores < MIN_SCORE) | (scores > MAX_SCORE))).any()):
            raise ValueError(f"Expected scores in [{MIN_SCORE:g}, {MAX_SCORE:g}] or NaN, but got {scores.tolist()}.")
        dtype = scores.dtype
        position = (scores.to(torch.float64).nan_to_num(MIN_SCORE) - MIN_SCORE) * STEPS_PER_UNIT
        lower = position.floor().clamp(max=GRID_SIZE - 2)
        upper_weight = (position - lower) * readable
        lower_weight = (1 - (position - lower)) * readable
        counts = torch.zeros(*scores.shape[:-1], GRID_SIZE, device=scores.device, dtype=torch.float64)
        counts = counts.scatter_add(-1, lower.long(), lower_weight).scatter_add(-1, lower.long() + 1, upper_weight)
        total = counts.sum(-1, keepdim=True)
        probabilities = torch.where(total > 0, counts / total, torch.nan)
        return cls(probabilities.to(dtype), readable.to(dtype).mean(-1))

    @classmethod
    def stack(cls, distributions: Sequence[ScoreDistribution]) -> ScoreDistribution:
        """One batch out of several distributions of equal shape."""
        if not distributions:
            raise ValueError("Expected at least one distribution to stack, but got none.")
        if len({(d.values, d.answers) for d in distributions}) > 1:
            raise ValueError("Expected distributions over the same answers, but got different ones.")
        return cls(
            torch.stack([d.probabilities for d in distributions]),
            torch.stack([d.coverage for d in distributions]),
            torch.stack([d.tag_probability for d in distributions]),
            distributions[0].values,
            distributions[0].answers,
        )

    def on_score_grid(self) -> ScoreDistribution:
        """The same over the scores 1.00, 1.01, ... 5.00, where all values are among them.

        So that words with values from 1 to 5 are scores like any other: comparable, mixable, to be written to files.
        """
        if self.values is None:
            return self
        places = [round((value - MIN_SCORE) * STEPS_PER_UNIT) for value in self.values]
        if not is_on_score_grid(self.values):
            raise ValueError(f"Expected values among 1.00, 1.01, ... 5.00, but got {self.values}.")
        probabilities = self.probabilities
        grid = probabilities.new_zeros(*probabilities.shape[:-1], GRID_SIZE)
        # A row without a score is NaN all over.
        grid = grid + probabilities.sum(-1, keepdim=True).detach() * 0
        grid = grid.index_copy(-1, torch.tensor(places, device=grid.device), probabilities)
        return ScoreDistribution(grid, self.coverage, self.tag_probability)

    @property
    def grid(self) -> Tensor:
        """The scores the probabilities belong to, shape ``(401,)`` or ``(N,)``."""
        if self.values is not None:
            return torch.tensor(self.values, device=self.probabilities.device, dtype=self.probabilities.dtype)
        return score_grid(self.probabilities.device, self.probabilities.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected score, shape ``(...)``, between the lowest and the highest value: in [1, 5] on the grid."""
        low, high = (MIN_SCORE, MAX_SCORE) if self.values is None else (self.values[0], self.values[-1])
        expected: Tensor = (self.probabilities * (self.grid - low)).sum(-1) + low
        return expected.clamp(low, high)

    @property
    def entropy(self) -> Tensor:
        """Shannon entropy, shape ``(...)``, in nats: 0 where one answer is certain."""
        # At a probability of 0 the slope is infinite, and a gradient would be NaN; 1 has the same entropy, 0.
        possible = torch.where(self.probabilities == 0, 1, self.probabilities)
        entropy: Tensor = torch.special.entr(possible).sum(-1)
        return entropy

    @property
    def variance(self) -> Tensor:
        """Variance of the score, shape ``(...)``, in squared score units, at most 4 on the grid."""
        return (self.probabilities * (self.grid - self.mean.unsqueeze(-1)) ** 2).sum(-1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the score, shape ``(...)``, in score units; without a gradient where it is 0."""
        variance = self.variance
        certain = variance == 0  # the root has an infinite slope there, and infinity times 0 is NaN
        return torch.where(certain, 0, torch.where(certain, 1, variance).sqrt())

    @property
    def mode(self) -> Tensor:
        """Most probable score, shape ``(...)``; the lowest of equals; NaN where there is no distribution."""
        best = self.grid[self.probabilities.nan_to_num(0).argmax(-1)]
        return torch.where(self.probabilities.isnan().any(-1), torch.nan, best)

    def quantile(self, q: float) -> Tensor:
        """Smallest score whose cumulative probability reaches ``q``, shape ``(...)``.

        Args:
            q: in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"Expected a quantile in [0, 1], but got {q}.")
        cumulative = self.probabilities.cumsum(-1)
        # Rounding may leave the last cumulative sum a little under 1, so the target never exceeds what was reached.
        target = (cumulative[..., -1:] * q).clamp(min=torch.finfo(cumulative.dtype).tiny)
        reached = cumulative >= target
        score = self.grid[reached.int().argmax(-1)]
        return torch.where(self.probabilities.isnan().any(-1), torch.nan, score)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Central interval that holds at least ``level`` (in [0, 1]) of the probability, as ``(low, high)``."""
        if not 0 <= level <= 1:
            raise ValueError(f"Expected a level in [0, 1], such as 0.95, but got {level!r}.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def mixture(self, dim: int = 0) -> ScoreDistribution:
        """The equal-weight mixture over a leading dimension, for instance over K reasonings of one picture.

        Rows of NaN (a reasoning without an answer) are left out; if all are NaN the mixture is NaN. ``coverage`` and
        ``tag_probability`` are averaged over the rows that take part.
        """
        if self.probabilities.ndim < 2:
            raise ValueError("Expected a batch of distributions to mix, but got a single one.")
        taking_part = ~self.probabilities.isnan().any(-1)
        weights = taking_part.to(self.probabilities.dtype)
        total = weights.sum(dim)

        def average(values: Tensor, weights: Tensor, total: Tensor) -> Tensor:
            mean = (values.nan_to_num(0) * weights).sum(dim) / total
            return torch.where(total > 0, mean, torch.nan)

        return ScoreDistribution(
            average(self.probabilities, weights.unsqueeze(-1), total.unsqueeze(-1)),
            average(self.coverage, weights, total),
            average(self.tag_probability, weights, total),
            self.values,
            self.answers,
        )

    def to(self, *args: Any, **kwargs: Any) -> ScoreDistribution:
        """Like :meth:`torch.Tensor.to`, for every tensor held."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def clone(self) -> ScoreDistribution:
        """With memory of its own: a row of a batch is a view, and its pickle holds the whole batch."""
        return self._map(Tensor.clone)

    def detach(self) -> ScoreDistribution:
        """Without the autograd graph."""
        return self._map(Tensor.detach)

    def __getitem__(self, index: Any) -> ScoreDistribution:
        if self.probabilities.ndim < 2:
            raise IndexError("A single distribution cannot be indexed; it has no leading dimension.")
        return self._map(lambda tensor: tensor[index])

    def __len__(self) -> int:
        if self.probabilities.ndim < 2:
            raise TypeError("A single distribution has no length; it has no leading dimension.")
        return self.probabilities.shape[0]

    def __repr__(self) -> str:
        if self.probabilities.ndim > 1:
            return f"ScoreDistribution(shape={tuple(self.probabilities.shape[:-1])})"
        if self.answers is not None and len(self.answers) <= 12:
            chances = zip(self.answers, self.probabilities.tolist(), strict=True)
            shown = ", ".join(f"{answer}={chance:.3f}" for answer, chance in chances)
            return f"ScoreDistribution({shown}, coverage={float(self.coverage):.3f})"
        mean, std = float(self.mean), float(self.std)
        shown = "no score" if math.isnan(mean) else f"mean={mean:.3f}, std={std:.3f}"
        return f"ScoreDistribution({shown}, coverage={float(self.coverage):.3f})"

    def _map(self, function: Callable[[Tensor], Tensor]) -> ScoreDistribution:
        probabilities, coverage, tag_probability = map(
            function, (self.probabilities, self.coverage, self.tag_probability)
        )
        return ScoreDistribution(probabilities, coverage, tag_probability, self.values, self.answers)
