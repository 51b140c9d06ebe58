"""`BestOfN`: make n candidates with a pipe, drop the unpromising early, score the finished pictures, keep the best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch

from vqr1_metric.integrations.diffusers.results import BestOfNOutput, Candidate, finish
from vqr1_metric.integrations.diffusers.runs import Run, neighbour
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, check_previews
from vqr1_metric.integrations.diffusers.scoring import AlsoScorer, PictureScorer
from vqr1_metric.integrations.diffusers.support import PipeInterface

Strategy = Literal["auto", "inplace", "restart"]


class BestOfN:
    """Best of n candidates of a diffusion pipeline, by the score of the finished pictures.

    Args:
        pipe: a diffusers pipeline, a modular one too. It is left as it was found, also after an exception.
        metric: a metric with a ``scorer`` or a :class:`~vqr1_metric.scorer.QualityScorer`. The scorer may live on
            another device than the pipe.
        update_metric: also ``update`` the metric with every kept picture that has a score (the metric scores it again).
        batch_size: candidates of one call of the pipe; more are made in several calls. A pipeline that was not tested
            for it makes one a call, whatever this says, and so does one that remembers earlier steps (cached
            activations): in a batch, a candidate might not be what its seed gives alone.
        frames: frames scored of a video, evenly spaced; its distribution is their mixture.
        also: other scorers, by name: pairs of a function of PIL pictures and the prompt that gives a number for each
            (a text-image score, say), and a weight. Candidates are chosen by quality score plus weighted numbers.

    Example:
        >>> best = BestOfN(pipe, metric)  # doctest: +SKIP
        >>> out = best("a lighthouse at dusk", n=16, keep=2, preview_at_ratio=0.4)  # doctest: +SKIP
        >>> out.images, out.scores, out.seeds  # doctest: +SKIP
    """

    def __init__(
        self,
        pipe: Any,
        metric: Any,
        *,
        update_metric: bool = False,
        batch_size: int = 4,
        frames: int = 4,
        also: Mapping[str, tuple[AlsoScorer, float]] | None = None,
    ) -> None:
        self.picture_scorer = PictureScorer(metric, frames, also)
        if update_metric and not hasattr(metric, "update"):
            raise TypeError(f"Expected a metric to update, but got {type(metric).__name__}.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size of at least 1, but got {batch_size}.")
        self.interface = PipeInterface(pipe)
        self.pipe, self.metric, self.update_metric = pipe, metric, update_metric
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """Candidates of one call of the pipe as it is now."""
        return self._batch_size if self.interface.batches and self.interface.remembers(self.pipe) is None else 1

    @overload
    def __call__(self, prompt: str | None = None, **arguments: Any) -> BestOfNOutput: ...

    @overload
    def __call__(self, prompt: list[str], **arguments: Any) -> list[BestOfNOutput]: ...

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        n: int = 8,
        keep: int = 1,
        preview_at_ratio: float | None = None,
        survivors: float | int = 0.5,
        strategy: Strategy = "auto",
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        generator: Sequence[torch.Generator] | None = None,
        **arguments: Any,
    ) -> BestOfNOutput | list[BestOfNOutput]:
        """Make, score and choose.

        Args:
            prompt: one prompt, or a list of them, each with its own n candidates (of the same seeds); None if
                ``arguments`` hold its embeddings, or the pipe takes none. Other prompts and pictures in lists of that
                length are shared out, one to each prompt; where the pipe takes several pictures for a prompt (several
                ControlNets, Flux.2), give a list of lists.
            n: candidates.
            keep: pictures to give back, at most the number of survivors.
            preview_at_ratio: share of the steps, in (0, 1), after which the predicted clean pictures are scored; None
                makes and scores all n. The step is ``floor(ratio * steps)``, at least 1, as in diffusers' own
                callbacks.
            survivors: share in (0, 1], or number, of candidates that are denoised to the end, chosen over all n.
            strategy: ``"inplace"`` carries the survivors on from the saved step, ``"restart"`` runs them again from
                their seeds, ``"auto"`` carries on where that is known to give the same pictures and restarts elsewhere.
            seed, seeds: candidate i has the seed ``seeds[i]``, by default ``seed + i``.
            generator: fresh generators on the CPU instead, one for each candidate; their seeds count.
            arguments: everything else goes to the pipe.

        Raises:
            ValueError, TypeError: for arguments that cannot work, before any denoising. ``UnsupportedError``, a
                ValueError, where ``"inplace"`` is not known to be exact.
        """
        candidate_seeds = _seeds(n, seed, seeds, generator)
        survivor_count = _survivor_count(n, keep, preview_at_ratio, survivors)
        self.interface.check_arguments(arguments)
        if prompt is not None and "prompt" not in self.interface.defaults:
            raise TypeError(f"{self.interface.name} takes no prompt.")
        chosen = self._strategy(strategy, preview_at_ratio, arguments)
        self.picture_scorer.load()
        if not isinstance(prompt, list):
            return self._one(prompt, candidate_seeds, keep, preview_at_ratio, survivor_count, chosen, arguments)
        if not prompt:
            raise ValueError("Expected at least one prompt, but got an empty list.")
        outputs = []
        for i, text in enumerate(prompt):
            own = self.interface.of_prompt(self.pipe, arguments, i, len(prompt))
            outputs.append(self._one(text, candidate_seeds, keep, preview_at_ratio, survivor_count, chosen, own))
        return outputs

    def search(
        self,
        prompt: str | None = None,
        *,
        budget: int,
        n: int = 4,
        neighbours: int = 4,
        step: float = 0.3,
        keep: int = 1,
        seed: int = 0,
        **arguments: Any,
    ) -> BestOfNOutput:
        r"""Search round the best noise instead of drawing ever more of it, within a budget of denoiser rows.

        Zero-order search (Ma et al., "Inference-time scaling for diffusion models beyond scaling denoising steps",
        arXiv 2501.09732): score ``n`` seeds; then, round after round, score ``neighbours`` of the best noise so far,
        :math:`\sqrt{1 - s^2}\, z + s\, \epsilon` with step :math:`s`, which keeps its variance.

        Args:
            prompt: one prompt.
            budget: denoiser rows that may be computed; a round that would exceed it is not begun.
            n: seeds of the first round.
            neighbours: candidates of each later round.
            step: in (0, 1]; 1 draws unrelated noise.
            keep: pictures to give back, at most n.
            seed: first seed; the others follow.
            arguments: everything else goes to the pipe.

        Returns:
            As for a call; ``strategy`` is ``"search"``. One of the first ``n`` candidates is what its seed alone makes;
            a later one is made again by passing its ``noise`` as ``latents`` and its seed's generator to the pipe.

        Raises:
            UnsupportedError: for pipelines that were not tested to take noise as ``latents``.
            ValueError: for a budget below the first round, known after its first call of the pipe.
        """
        if not 0 < step <= 1:
            raise ValueError(f"Expected step in (0, 1], but got {step}.")
        if neighbours < 1 or budget < 1:
            raise ValueError(f"Expected neighbours and budget of at least 1, but got {neighbours} and {budget}.")
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"Expected one prompt to search for, but got {type(prompt).__name__}.")
        _survivor_count(n, keep, None, 1)
        self.interface.check_arguments(arguments)
        self.interface.check_noise()
        self.picture_scorer.load()
        if prompt is not None:
            arguments = dict(arguments, prompt=prompt)
        run = Run(self, arguments, budget=budget, keep_noise=True)
        candidates = [Candidate(seed + i) for i in range(n)]
        run.finals(candidates)
        while run.fits(neighbours):
            pivot = max(candidates, key=lambda c: -math.inf if math.isnan(c.value) else c.value)
            first = seed + len(candidates)
            around = [Candidate(first + i, noise=neighbour(pivot.noise, first + i, step)) for i in range(neighbours)]
            run.finals(around)
            candidates += around
        return self._finish(run, candidates, keep, "search")

    # ---------------------------------------------------------------- one prompt

    def _one(
        self,
        prompt: str | None,
        seeds: list[int],
        keep: int,
        preview_at: float | None,
        survivor_count: int,
        strategy: str,
        arguments: dict[str, Any],
    ) -> BestOfNOutput:
        if prompt is not None:
            arguments = dict(arguments, prompt=prompt)
        run = Run(self, arguments)
        candidates = [Candidate(seed) for seed in seeds]
        if preview_at is None or survivor_count == len(seeds):
            strategy = "plain"
        else:
            run.previews(candidates, preview_at, save=strategy == "inplace")
            values = [candidate.preview_value for candidate in candidates]
            best = sorted(range(len(seeds)), key=lambda i: (math.isnan(values[i]), -values[i], i))
            for index in best[survivor_count:]:
                candidates[index].survived = False
        run.finals(candidates)
        return self._finish(run, candidates, keep, strategy)

    def _finish(self, run: Run, candidates: list[Candidate], keep: int, strategy: str) -> BestOfNOutput:
        output = finish(
            candidates,
            keep,
            strategy=strategy,
            denoiser_rows=run.rows,
            scoring_seconds=run.scoring_seconds,
            total_seconds=time.perf_counter() - run.started,
        )
        scored = [image for image, score in zip(output.images, output.scores, strict=True) if not math.isnan(score)]
        if self.update_metric and scored:  # a blanked picture is black, and would get a score
            self.metric.update([part for image in scored for part in self.picture_scorer.parts(image)])
        return output

    def _strategy(self, strategy: Strategy, preview_at: float | None, arguments: dict[str, Any]) -> str:
        if strategy not in ("auto", "inplace", "restart"):
            raise ValueError(f"Expected strategy to be auto, inplace or restart, but got {strategy!r}.")
        if preview_at is not None:
            check_previews(self.pipe.scheduler)
        if strategy == "restart":
            return strategy
        reason = self.interface.reason_to_restart(self.pipe, arguments)
        if reason is None:
            return "inplace"
        if strategy == "inplace":
            raise UnsupportedError(
                f'strategy="inplace" is not known to give the same pictures: {reason}. Use "restart".'
            )
        return "restart"


def _seeds(n: int, seed: int, seeds: Sequence[int] | None, generator: Sequence[torch.Generator] | None) -> list[int]:
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
    if seeds is not None:
        if len(seeds) != n:
            raise ValueError(f"Expected one seed for each of n={n} candidates, but got {len(seeds)}.")
        return [int(s) for s in seeds]
    return [seed + i for i in range(n)]


def _survivor_count(n: int, keep: int, preview_at: float | None, survivors: float | int) -> int:
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
