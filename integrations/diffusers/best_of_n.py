"""`BestOfN`: make n candidates with a pipe, drop the unpromising early, score the finished pictures, keep the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from vqr1_metric.integrations.diffusers import private, strategies
from vqr1_metric.integrations.diffusers.pipes import Maker, Pipe, SampleFunction
from vqr1_metric.integrations.diffusers.records import Store
from vqr1_metric.integrations.diffusers.results import BestOfNOutput, Candidate
from vqr1_metric.integrations.diffusers.runs import Run
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, check_previews
from vqr1_metric.integrations.diffusers.scoring import Combine, PictureScorer
from vqr1_metric.integrations.diffusers.strategies import Potential, seeds_of, survivor_count

Strategy = Literal["auto", "inplace", "restart"]


class BestOfN:
    """Best of n candidates of a diffusion pipeline, by the score of the finished pictures.

    Quality is not all: the score does not know the prompt, and the best of many may be the one that forgot it. Choose
    by text alignment too, with ``also`` and ``thresholds``, and look at the pictures.

    Args:
        pipe: a diffusers pipeline, a modular one too. It is only read: every call runs on a copy of it that shares the
            weights, so other calls, in other threads too, are not disturbed.
        metric: a metric with a ``scorer`` or a :class:`~vqr1_metric.scorer.QualityScorer`. The scorer may live on
            another device than the pipe.
        update_metric: also ``update`` the metric with every kept picture that has a score (the metric scores it again).
        batch_size: candidates of one call of the pipe; more are made in several calls. A pipeline that was not tested
            for it makes one a call, whatever this says, and so does one that remembers earlier steps (cached
            activations): in a batch, a candidate might not be what its seed gives alone.
        frames, also, combine, thresholds: what is scored of a video, other scorers and how they take part; see
            :class:`~vqr1_metric.integrations.diffusers.scoring.PictureScorer`.

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
        also: Mapping[str, tuple[Any, float]] | None = None,
        combine: Combine = "sum",
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.picture_scorer = PictureScorer(metric, frames, also, combine, thresholds)
        if update_metric and not hasattr(metric, "update"):
            raise TypeError(f"Expected a metric to update, but got {type(metric).__name__}.")
        if batch_size < 1:
            raise ValueError(f"Expected batch_size of at least 1, but got {batch_size}.")
        self.pipe, self.metric, self.update_metric = pipe, metric, update_metric
        self.maker: Maker = pipe if isinstance(pipe, SampleFunction) else Pipe(pipe, batch_size)

    @classmethod
    def from_function(
        cls, sample: Callable[..., Any], metric: Any, *, batch_size: int | None = None, **options: Any
    ) -> BestOfN:
        """Best of n of anything that makes a picture of a seed: two pipes in a row, a ComfyUI graph, a remote service.

        Args:
            sample: ``sample(seed, **arguments)`` gives a picture (a video: a list of frames), ``prompt`` being one of
                the arguments where there is one; with ``batch_size``, ``sample(seeds, **arguments)`` gives as many.
            metric: as for a pipe.
            batch_size: most seeds of one call of ``sample``; None calls it with one seed, not a list.
            options: as for a pipe.
        """
        if not callable(sample):
            raise TypeError(f"Expected a function of a seed, but got {type(sample).__name__}.")
        return cls(SampleFunction(sample, batch_size), metric, batch_size=batch_size or 1, **options)

    @property
    def batch_size(self) -> int:
        """Candidates of one call of the pipe as it is now."""
        return self.maker.batch_size

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
        folder: str | Path | None = None,
        on_candidate: Callable[[Candidate], Any] | None = None,
        scored_prompt: str | list[str] | None = None,
        pipe_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> BestOfNOutput | list[BestOfNOutput]:
        """Make, score and choose.

        A cancel (``pipe._interrupt = True``, by a callback or another thread), an exception or Ctrl-C ends the run.
        What was finished is given back, and ``interrupted`` says why it is not all. If nothing was finished, an
        exception is raised as it came.

        Args:
            prompt: one prompt, or a list of them, each with its own n candidates (of the same seeds); None if
                ``arguments`` hold its embeddings, or the pipe takes none. Other prompts, pictures and embeddings in
                lists or tensors of that length are shared out, one to each prompt; where the pipe takes several
                pictures for a prompt (several ControlNets, Flux.2), give a list of lists.
            n: candidates.
            keep: pictures to give back, at most the number of survivors.
            preview_at_ratio: the predicted clean pictures are scored after the step ``int(ratio * steps)``, counted
                from 0 as in diffusers' own callbacks; None makes and scores all n.
            survivors: share in (0, 1], or number, of candidates that are denoised to the end, chosen over all n.
            strategy: ``"inplace"`` carries the survivors on from the saved step, ``"restart"`` runs them again from
                their seeds, ``"auto"`` carries on where that is known to give the same pictures and restarts elsewhere.
            seed, seeds: candidate i has the seed ``seeds[i]``, by default ``seed + i``.
            generator: fresh generators on the CPU instead, one for each candidate; their seeds count.
            folder: keep every finished picture there, and take from there what an earlier run of the same settings has
                made. With several prompts, one folder within for each.
            on_candidate: called with each finished :class:`Candidate`.
            scored_prompt: the text that other scorers get, where ``prompt`` is not it.
            pipe_arguments: arguments of the pipe whose names this method has itself.
            arguments: everything else goes to the pipe.

        Raises:
            ValueError, TypeError: for arguments that cannot work, before any denoising. ``UnsupportedError``, a
                ValueError, where ``"inplace"`` is not known to be exact.
        """
        candidate_seeds = seeds_of(n, seed, seeds, generator)
        count = survivor_count(n, keep, preview_at_ratio, survivors)
        arguments |= pipe_arguments or {}
        chosen = self._strategy(strategy, preview_at_ratio, arguments)

        plain = "plain" if isinstance(self.maker, Pipe) else "function"
        used = plain if preview_at_ratio is None or count == n else chosen

        def one(run: Run) -> BestOfNOutput:
            if preview_at_ratio is None or count == n:
                candidates = strategies.plain(run, candidate_seeds)
            else:
                candidates = strategies.pruned(run, candidate_seeds, preview_at_ratio, count, used == "inplace")
            return self._finish(run, candidates, keep, used)

        return self._for_each(prompt, arguments, one, folder, on_candidate, scored_prompt)

    def search(
        self,
        prompt: str | list[str] | None = None,
        *,
        budget: int,
        n: int = 4,
        neighbours: int = 4,
        step: float = 0.3,
        patience: int = 3,
        keep: int = 1,
        seed: int = 0,
        scored_prompt: str | list[str] | None = None,
        **arguments: Any,
    ) -> BestOfNOutput | list[BestOfNOutput]:
        r"""Search round the best noise instead of drawing ever more of it, within a budget of denoiser rows.

        Zero-order search (Ma et al., "Inference-time scaling for diffusion models beyond scaling denoising steps",
        arXiv 2501.09732): score ``n`` seeds; then, round after round, score ``neighbours`` of the best noise so far,
        :math:`\sqrt{1 - s^2}\, z + s\, \epsilon` with step :math:`s`, which keeps its variance. Where an input picture
        is the start (image-to-image), the noise is what the pipe adds to it.

        Args:
            prompt: one prompt, or a list, each with the whole budget.
            budget: denoiser rows that may be computed; a round that would exceed it is not begun.
            n: seeds of the first round, and of a new start.
            neighbours: candidates of each later round.
            step: in (0, 1]; 1 draws unrelated noise.
            patience: after so many rounds without a better one, start anew from n fresh seeds.
            keep: pictures to give back, at most n.
            seed: first seed; the others follow.
            scored_prompt: as for a call.
            arguments: everything else goes to the pipe.

        Returns:
            As for a call; ``strategy`` is ``"search"``, and ``trace`` and ``plot()`` show its course. A candidate
            without a ``parent`` is what its seed alone makes; :meth:`remake` makes any again.

        Raises:
            UnsupportedError: for pipelines that do not start from the noise passed as ``latents``; of one that was not
                tested, this is known after the first round, which is then given back as an interrupted run.
            ValueError: for a budget below the first round, known after its first call of the pipe.
        """
        if not 0 < step <= 1:
            raise ValueError(f"Expected step in (0, 1], but got {step}.")
        if neighbours < 1 or budget < 1 or patience < 1:
            raise ValueError(
                "Expected neighbours, budget and patience of at least 1, but got "
                f"{neighbours}, {budget} and {patience}."
            )
        survivor_count(n, keep, None, 1)
        self._only_a_pipe("search")
        if "packs" in (self._pipe.tested or ()):
            raise UnsupportedError(f"{self.maker.name} takes no noise to start from; use a larger n.")

        seeds = seeds_of(n, seed, None, None)

        def one(run: Run) -> BestOfNOutput:
            run.budget = budget
            candidates = strategies.search(run, seeds, neighbours, step, patience, "latents" in self._pipe.defaults)
            return self._finish(run, candidates, keep, "search")

        return self._for_each(prompt, arguments, one, None, None, scored_prompt)

    def particles(
        self,
        prompt: str | list[str] | None = None,
        *,
        n: int = 8,
        resample_at: Sequence[float] = (0.2, 0.4, 0.6),
        potential: Potential = "max",
        strength: float = 4.0,
        keep: int = 1,
        seed: int = 0,
        scored_prompt: str | list[str] | None = None,
        **arguments: Any,
    ) -> BestOfNOutput | list[BestOfNOutput]:
        r"""Resample n particles by the scores of their previews, several times on their way.

        Feynman-Kac steering (Singhal et al., "A general framework for inference-time scaling and steering of diffusion
        models", arXiv 2501.06848): after each step of ``resample_at``, particle i lives on in a number of copies that
        is on average in proportion to its potential :math:`G_i` (systematic resampling). With preview values
        :math:`r_1, ..., r_t` so far and strength :math:`\lambda`, :math:`G` is :math:`\exp(\lambda \max_s r_s)` for
        ``"max"``, :math:`\exp(\lambda (r_t - r_{t-1}))` for ``"difference"``, and :math:`\exp(\lambda \sum_s r_s)`
        for ``"sum"``. Costs as many denoiser rows as a plain best of n. Copies differ by the noise that the scheduler
        draws, each from its own seed on; a scheduler that draws none is refused.

        Args:
            prompt: one prompt, or a list.
            n: particles.
            resample_at: ratios of the steps as in ``preview_at_ratio``, ascending.
            potential: of a particle.
            strength: :math:`\lambda`, per unit of the value that candidates are chosen by.
            keep: pictures to give back, at most n.
            seed: first seed; the others follow, those of copies too.
            scored_prompt: as for a call.
            arguments: everything else goes to the pipe.

        Returns:
            As for a call; ``records`` hold the particles that were dropped, and the copies with their ``parent``.

        Raises:
            UnsupportedError: where carrying on from a saved step is not known to be exact, or the scheduler draws no
                noise (known after the first preview).
        """
        if potential not in ("max", "difference", "sum"):
            raise ValueError(f"Expected potential to be max, difference or sum, but got {potential!r}.")
        ratios = list(resample_at)
        if not ratios or ratios != sorted(set(ratios)) or not all(0 <= ratio < 1 for ratio in ratios):
            raise ValueError(f"Expected resample_at to be ascending ratios in [0, 1), but got {resample_at}.")
        survivor_count(n, keep, None, 1)
        self._only_a_pipe("particles")
        self._strategy("inplace", ratios[0], arguments)

        seeds = seeds_of(n, seed, None, None)

        def one(run: Run) -> BestOfNOutput:
            candidates = strategies.particles(run, seeds, ratios, potential, strength)
            return self._finish(run, candidates, keep, "particles")

        return self._for_each(prompt, arguments, one, None, None, scored_prompt)

    def remake(self, candidate: Candidate, prompt: str | None = None, **arguments: Any) -> Any:
        """The picture of a candidate of a call or a search, made again in a call of its own with the same arguments."""
        if candidate.parent is not None and candidate.noise is None:
            raise ValueError(
                "Expected a candidate of a call or a search, but a copy of a particle is made by its run only."
            )
        noise: dict[str, Any] = {"added_noise" if candidate.noise_added else "latents": candidate.noise}
        steer = noise if candidate.parent is not None else {}
        given = arguments if prompt is None else dict(arguments, prompt=prompt)
        return self.maker.make(given, [candidate.seed], **steer).pictures[0]

    # ---------------------------------------------------------------- within

    def scorer_identity(self) -> dict[str, Any]:
        """Everything that decides a score, as far as the scorer tells."""
        identity = getattr(self.picture_scorer.scorer, "identity", None)
        return dict(identity()) if callable(identity) else {"scorer": type(self.picture_scorer.scorer).__name__}

    @property
    def _pipe(self) -> Pipe:
        assert isinstance(self.maker, Pipe)
        return self.maker

    def _only_a_pipe(self, what: str) -> None:
        if not isinstance(self.maker, Pipe):
            raise UnsupportedError(f"Expected a pipe for {what}, but {self.maker.name} is a function of a seed.")

    def _for_each(
        self,
        prompt: str | list[str] | None,
        arguments: dict[str, Any],
        one: Callable[[Run], BestOfNOutput],
        folder: str | Path | None,
        on_candidate: Callable[[Candidate], Any] | None,
        scored_prompt: str | list[str] | None,
    ) -> BestOfNOutput | list[BestOfNOutput]:
        """Run ``one`` for each prompt. When one is interrupted, the rest is not begun."""
        listed = isinstance(prompt, list)
        prompts: list[str | None] = list(prompt) if isinstance(prompt, list) else [prompt]
        if not prompts:
            raise ValueError("Expected at least one prompt, but got an empty list.")
        texts: list[str | None] = list(prompts)
        if scored_prompt is not None:
            texts = list(scored_prompt) if isinstance(scored_prompt, list) else [scored_prompt] * len(prompts)
            if len(texts) != len(prompts):
                raise ValueError(f"Expected {len(prompts)} entries of scored_prompt, but got {len(texts)}.")
        self.maker.check_arguments(arguments, len(prompts))
        if prompts[0] is not None and isinstance(self.maker, Pipe) and "prompt" not in self.maker.defaults:
            raise TypeError(f"{self.maker.name} takes no prompt.")
        self.picture_scorer.load()
        if isinstance(self.maker, Pipe):
            private.interrupt(self.maker.pipe, False)  # as the pipe does at the beginning of a call
        outputs: list[BestOfNOutput] = []
        for i, text in enumerate(prompts):
            own = self.maker.of_prompt(arguments, i, len(prompts))
            if text is not None:
                own = dict(own, prompt=text)
            store = None
            if folder is not None:
                place = Path(folder) / f"{i:04d}" if listed else Path(folder)
                store = Store(place, own | {"maker": self.maker.about()}, str(own.get("output_type", "pil")))
            run = Run(self.maker, self.picture_scorer, own, texts[i], on_candidate=on_candidate, store=store)
            if outputs and outputs[-1].interrupted is not None:
                run.interrupted = "not begun: an earlier prompt was interrupted"
                outputs.append(run.output([], 0, outputs[-1].strategy, {}))
                continue
            try:
                outputs.append(one(run))
            except (Exception, KeyboardInterrupt) as error:
                if not any(output.images for output in outputs):
                    raise
                run.error, run.interrupted = error, f"{type(error).__name__}: {error}"
                warnings.warn(f"Prompt {i} ended the run, what was made is kept: {run.interrupted}", stacklevel=3)
                outputs.append(run.output([], 0, outputs[-1].strategy, {}))
        return outputs if listed else outputs[0]

    def _finish(self, run: Run, candidates: list[Candidate], keep: int, strategy: str) -> BestOfNOutput:
        backend = self.picture_scorer.scorer.backend
        about = self.maker.about() | {"scorer": {n: getattr(backend, n, None) for n in ("model_id", "revision")}}
        output = run.output(candidates, keep, strategy, about)
        scored = [image for image, score in zip(output.images, output.scores, strict=True) if not math.isnan(score)]
        if self.update_metric and scored:  # a blanked picture is black, and would get a score
            self.metric.update([part for image in scored for part in self.picture_scorer.parts(image)])
        return output

    def _strategy(self, strategy: Strategy, preview_at: float | None, arguments: dict[str, Any]) -> str:
        if strategy not in ("auto", "inplace", "restart"):
            raise ValueError(f"Expected strategy to be auto, inplace or restart, but got {strategy!r}.")
        if not isinstance(self.maker, Pipe):
            if preview_at is not None:
                self._only_a_pipe("previews")
            return "function"
        if preview_at is not None:
            check_previews(self.maker.pipe.scheduler)
        if strategy == "restart":
            return strategy
        reason = self.maker.reason_to_restart(arguments)
        if reason is None:
            return "inplace"
        if strategy == "inplace":
            raise UnsupportedError(
                f'strategy="inplace" is not known to give the same pictures: {reason}. Use "restart".'
            )
        return "restart"
