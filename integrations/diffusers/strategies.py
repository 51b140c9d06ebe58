"""How candidates are chosen: all of them, by previews, by search, or as particles; each is a course of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vqr1_metric.integrations.diffusers.results import Candidate, order, rate
from vqr1_metric.integrations.diffusers.runs import Run
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError

Potential = Literal["max", "difference", "sum"]
#: Added to the seed of a direction of search, so that its noise is not the noise that the sampler draws.
_DIRECTIONS = 0x5EED_0F_D14EC710


def plain(run: Run, seeds: Sequence[int]) -> list[Candidate]:
    """Make and score them all."""
    candidates = [Candidate(seed) for seed in seeds]
    run.finals(candidates)
    return candidates


def pruned(run: Run, seeds: Sequence[int], preview_at: float, count: int, save: bool) -> list[Candidate]:
    """Finish the ``count`` best previews; all that can, where no preview has a score: there is nothing to choose by."""
    candidates = [Candidate(seed) for seed in seeds]
    run.previews(candidates, preview_at, save)
    if any(math.isfinite(candidate.preview_value) for candidate in candidates):
        best = [i for i in order(candidates, preview=True) if candidates[i].survived]
        for index in best[count:]:
            candidates[index].survived = False
    run.finals(candidates)
    return candidates


def search(
    run: Run, seeds: Sequence[int], neighbours: int, step: float, patience: int, takes_latents: bool
) -> list[Candidate]:
    """Zero-order search within the budget of the run; see ``BestOfN.search``.

    Args:
        run: with a budget.
        seeds: of the first round, in a row; later seeds follow.
        neighbours, step, patience: as there.
        takes_latents: may the pipe be given noise as ``latents``?
    """
    candidates: list[Candidate] = []
    group = [Candidate(seed) for seed in seeds]
    stalled, start = 0, 0
    while True:
        run.finals(group)
        candidates += group
        rate(candidates, run.scorer)
        run.trace.append((run.rows, candidates[order(candidates)[0]].value))
        pivot = start + order(candidates[start:])[0]  # the best since the last start
        stalled = 0 if pivot >= len(candidates) - len(group) else stalled + 1
        fresh = stalled >= patience
        if run.interrupted is not None or not run.fits(len(seeds) if fresh else neighbours):
            return candidates
        origin, first, turn = candidates[pivot], seeds[0] + len(candidates), candidates[-1].round + 1
        if fresh:
            stalled, start = 0, len(candidates)
            group = [Candidate(first + i, round=turn) for i in range(len(seeds))]
            continue
        if origin.noise is None or not (origin.noise_added or takes_latents):
            raise UnsupportedError(f"{run.maker.name} takes no noise to start from; use a larger n.")
        group = [
            Candidate(
                first + i,
                noise=neighbour(origin.noise, first + i, step),
                noise_added=origin.noise_added,
                parent=pivot,
                round=turn,
            )
            for i in range(neighbours)
        ]


def particles(
    run: Run, seeds: Sequence[int], ratios: Sequence[float], potential: Potential, strength: float
) -> list[Candidate]:
    """Feynman-Kac steering; see ``BestOfN.particles``."""
    alive = [Candidate(seed) for seed in seeds]
    candidates = list(alive)
    history: dict[int, list[float]] = {id(c): [] for c in alive}
    for turn, ratio in enumerate(ratios):
        run.previews(alive, ratio, save=True)
        if not run.draws_noise():
            raise UnsupportedError(
                "Copies of a particle would stay the same, because the scheduler draws no noise; use one that does "
                "(Euler ancestral, DDIM with eta=1, FlowMatchEuler with stochastic_sampling), or search."
            )
        for c in alive:
            history[id(c)].append(c.preview_value)
        logs = [strength * log_potential(history[id(c)], potential) if c.survived else -math.inf for c in alive]
        if run.interrupted is not None or not any(math.isfinite(log) for log in logs):
            break
        following: list[Candidate] = []
        for i in resampled(logs, seeds[0] + 7919 * (turn + 1)):
            parent = alive[i]
            if all(c is not parent for c in following):
                following.append(parent)
                continue
            place = next(k for k, c in enumerate(candidates) if c is parent)
            child = Candidate(seeds[0] + len(candidates), parent=place, round=turn + 1)
            run.fork(child, parent)
            history[id(child)] = list(history[id(parent)])
            candidates.append(child)
            following.append(child)
        for c in alive:
            c.survived = any(c is other for other in following)
        alive = following
    run.finals(alive)
    return candidates


def log_potential(values: Iterable[float], kind: Potential) -> float:
    """Of one particle at unit strength, from its preview values so far; minus infinity if the last one is NaN."""
    seen = list(values)
    known = [value for value in seen if math.isfinite(value)]
    if not math.isfinite(seen[-1]):
        return -math.inf
    if kind == "max":
        return max(known)
    return sum(known) if kind == "sum" else known[-1] - (known[-2] if len(known) > 1 else 0.0)


def neighbour(noise: Tensor, seed: int, step: float) -> Tensor:
    """Noise at a distance from other noise, with the same variance.

    Args:
        noise: standard normal, any shape.
        seed: of the direction, which is independent of what a sampler with a generator of this seed draws.
        step: share of new noise, in (0, 1].
    """
    generator = torch.Generator().manual_seed((seed + _DIRECTIONS) % 2**63)
    new = torch.randn(noise.shape, generator=generator, dtype=torch.float32)
    kept: float = (1 - step**2) ** 0.5
    return (kept * noise.float() + step * new).to(noise.dtype)


def resampled(log_potentials: list[float], seed: int) -> list[int]:
    """Systematic resampling: as many positions, each on average in proportion to its potential.

    Args:
        log_potentials: of each particle; minus infinity never survives.
        seed: of the one random number.
    """
    weights = torch.tensor(log_potentials, dtype=torch.float64).softmax(0)
    n = len(log_potentials)
    first = float(torch.rand((), generator=torch.Generator().manual_seed(seed % 2**63)))
    points = (torch.arange(n, dtype=torch.float64) + first) / n
    return torch.searchsorted(weights.cumsum(0), points).clamp(max=n - 1).tolist()


def seeds_of(n: int, seed: int, seeds: Sequence[int] | None, generator: Sequence[torch.Generator] | None) -> list[int]:
    """The seed of each of n candidates, checked."""
    if n < 1:
        raise ValueError(f"Expected n of at least 1, but got {n}.")
    if generator is not None:
        if isinstance(generator, torch.Generator) or len(generator) != n:
            given = "a single one" if isinstance(generator, torch.Generator) else f"{len(generator)}"
            raise ValueError(f"Expected one generator for each of n={n} candidates, but got {given}; or pass seed=.")
        for i, g in enumerate(generator):
            if g.device.type != "cpu":  # whose noise differs from that of the CPU's with the same seed
                raise ValueError(f"Expected generators on the CPU, but generator {i} is on {g.device}.")
            if not torch.equal(g.get_state(), torch.Generator(g.device).manual_seed(g.initial_seed()).get_state()):
                raise ValueError(
                    f"Expected fresh generators, but generator {i} was used; its seed could not make it again."
                )
        return [g.initial_seed() for g in generator]
    if seeds is not None and len(seeds) != n:
        raise ValueError(f"Expected one seed for each of n={n} candidates, but got {len(seeds)}.")
    chosen = [int(s) for s in seeds] if seeds is not None else [seed + i for i in range(n)]
    for s in chosen:
        if not -(2**63) <= s < 2**64:
            raise ValueError(f"Expected seeds from -2**63 to 2**64 - 1, which PyTorch takes, but got {s}.")
    return chosen


def survivor_count(n: int, keep: int, preview_at: float | None, survivors: float | int) -> int:
    """How many of n candidates are finished, checked."""
    if not 1 <= keep <= n:
        raise ValueError(f"Expected keep from 1 to n={n}, but got {keep}.")
    if preview_at is None:
        return n
    if not 0 < preview_at < 1:
        raise ValueError(f"Expected preview_at_ratio between 0 and 1, exclusive, but got {preview_at}.")
    if isinstance(survivors, int) and not isinstance(survivors, bool):
        count = survivors
    elif isinstance(survivors, float) and 0 < survivors <= 1:
        count = max(keep, math.ceil(n * survivors - 1e-9))
    else:
        raise ValueError(f"Expected survivors as a share in (0, 1] or a number of candidates, but got {survivors!r}.")
    if not keep <= count <= n:
        raise ValueError(f"Expected from keep={keep} to n={n} survivors, but got {count}.")
    return count
