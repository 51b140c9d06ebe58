"""What a best-of-n run gives back."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from vqr1_metric import __version__
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.functional.thurstone import comparison_probability
from vqr1_metric.integrations.diffusers import records as files
from vqr1_metric.integrations.diffusers.scoring import PictureScorer
from vqr1_metric.results import TIE_MARGIN, ImageScore, RankedImage, rank_results


@dataclass(eq=False)
class Candidate:
    """One candidate of a run, kept or not.

    Args:
        seed: ``torch.Generator().manual_seed(seed)`` passed to the pipe makes it again alone; a neighbour of a search
            needs its ``noise`` too, and a particle is made by its run only.
        preview: decoded prediction of its clean picture, and ``preview_result`` its score; None without a preview.
        survived: was it denoised to the end?
        picture: the final picture (for a video: list of frames), None for those that did not survive.
        result: score of the final picture; NaN with a reason where there is none.
        extras, preview_extras: what other scorers said of the picture and the preview, by name.
        value, preview_value: what it is chosen by, finally and as a preview; NaN without a score.
        missed: thresholds that its picture, or else its preview, does not reach.
        noise: of a search: what it started from, shape ``(1, ...)``; ``noise_added``: added to an input picture.
        parent: of a search or of particles: position in ``records`` of the candidate that it was made of.
        round: of a search: from 0, when it was made.
    """

    seed: int
    survived: bool = True
    preview: Any = None
    preview_result: ImageScore | None = None
    picture: Any = None
    result: ImageScore | None = None
    extras: dict[str, float] = field(default_factory=dict)
    preview_extras: dict[str, float] = field(default_factory=dict)
    value: float = math.nan
    preview_value: float = math.nan
    missed: list[str] = field(default_factory=list)
    noise: Tensor | None = field(default=None, repr=False)
    noise_added: bool = False
    parent: int | None = None
    round: int = 0

    @property
    def score(self) -> float:
        """Score of the final picture in [1, 5], NaN where there is none."""
        return math.nan if self.result is None else self.result.score

    @property
    def preview_score(self) -> float:
        """Score of the preview in [1, 5], NaN where there is none."""
        return math.nan if self.preview_result is None else self.preview_result.score


@dataclass
class BestOfNOutput(BaseOutput):  # type: ignore[misc]
    """The kept pictures of one prompt, best first.

    Args:
        images: the ``keep`` best pictures; for a video pipeline, lists of frames.
        scores: their scores in [1, 5], NaN where a picture has none.
        distributions: their score distributions.
        seeds: their seeds.
        ranking: all pictures that were finished, best first, with ties; ``index`` counts in ``records``.
        records: every candidate, in the order of its making.
        strategy: ``"plain"``, ``"restart"``, ``"inplace"``, ``"search"``, ``"particles"`` or ``"function"``.
        denoiser_rows: rows that the denoisers computed; with classifier-free guidance a picture costs two for each
            step.
        scoring_seconds, total_seconds: wall-clock times.
        prompt: the prompt, where there was one.
        interrupted: why the run ended before all candidates were made, or None. ``images`` hold the best of those that
            were finished until then, and may be fewer than asked for, or none.
        error: the exception that ended it, or None.
        trace: of a search: pairs of denoiser rows and the best value, after every round.
        about: pipe, scheduler, scorer and versions, as ``save`` writes them.
    """

    images: list[Any]
    scores: list[float]
    distributions: list[ScoreDistribution]
    seeds: list[int]
    ranking: list[RankedImage]
    records: list[Candidate]
    strategy: str
    denoiser_rows: int
    scoring_seconds: float
    total_seconds: float
    prompt: str | None = None
    interrupted: str | None = None
    error: BaseException | None = None
    trace: list[tuple[int, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def win_probability(self) -> float:
        """Probability that the first is better than the second; NaN where there is no second or no score."""
        beats = self.ranking[0].beats_next if self.ranking else None
        return math.nan if beats is None else beats

    @property
    def tied(self) -> bool:
        """Is the choice between first and second a coin toss?"""
        return abs(self.win_probability - 0.5) < TIE_MARGIN

    def grid(self, columns: int | None = None) -> Image.Image:
        """The kept pictures side by side, best first, each with its score and seed; of a video, its first frame."""
        labels = [f"{score:.2f}  seed {seed}" for score, seed in zip(self.scores, self.seeds, strict=True)]
        return files.sheet(self.images, labels, columns)

    def save(self, folder: str | Path) -> Path:
        """Write the kept pictures as PNG, what is known of every candidate, and a contact sheet.

        ``NN_seedS.png`` are the kept pictures, best first, with prompt, seed, score and the rest in their metadata;
        ``results.jsonl`` has one line for every candidate, ``run.json`` what is true of all, ``contact.png`` the kept
        pictures with their scores.
        """
        return _save(self, Path(folder))

    def plot(self, path: str | Path | None = None) -> Any:
        """The trace of a search: best value over denoiser rows, as a matplotlib figure, saved if a path is given."""
        from matplotlib.figure import Figure

        if not self.trace:
            raise ValueError(f"Expected the output of a search, which has a trace, but got one of {self.strategy!r}.")
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.step(*zip(*self.trace, strict=True), where="post", marker="o")
        axes.set(xlabel="denoiser rows", ylabel="best value so far")
        if path is not None:
            figure.savefig(path)
        return figure


def order(candidates: Sequence[Candidate], preview: bool = False) -> list[int]:
    """Positions, best first: those that reach all thresholds, by value, then the others, then those without a score."""
    values = [candidate.preview_value if preview else candidate.value for candidate in candidates]
    places = range(len(candidates))
    return sorted(places, key=lambda i: (math.isnan(values[i]), bool(candidates[i].missed), -values[i], i))


def rate(candidates: Sequence[Candidate], scorer: PictureScorer, preview: bool = False) -> None:
    """Set what each of these rivals is chosen by."""
    rivals = [c for c in candidates if (c.preview_result if preview else c.result) is not None]
    scores = [c.preview_score if preview else c.score for c in rivals]
    extras = [c.preview_extras if preview else c.extras for c in rivals]
    for candidate, (value, missed) in zip(rivals, scorer.choose_by(scores, extras), strict=True):
        candidate.missed = missed
        if preview:
            candidate.preview_value = value
        else:
            candidate.value = value


def _ranking(candidates: Sequence[Candidate], by_sum: bool) -> list[RankedImage]:
    """As ``rank_results``, by value.

    For a sum, every score distribution is moved by what other scorers add (normal approximation); of ranks, products
    and thresholds there is no probability, and equal values tie.
    """
    values = [candidate.value for candidate in candidates]
    places = order(candidates)

    def beats(a: int, b: int) -> float:
        if not by_sum:
            return 0.5 if (values[a], candidates[a].missed) == (values[b], candidates[b].missed) else math.nan
        numbers = [values[a], _std(candidates[a]) ** 2, values[b], _std(candidates[b]) ** 2]
        mean_a, variance_a, mean_b, variance_b = map(torch.tensor, numbers)
        return float(comparison_probability(mean_a, variance_a, mean_b, variance_b))

    ranks: list[int | None] = []
    leader = 0
    for place, index in enumerate(places):
        if not abs(beats(places[leader], index) - 0.5) < TIE_MARGIN:
            leader = place
        ranks.append(None if math.isnan(values[index]) else leader + 1)
    chances = [beats(a, b) for a, b in itertools.pairwise(places)] + [math.nan]
    ranked = []
    for rank, i, chance in zip(ranks, places, chances, strict=True):
        result = candidates[i].result
        assert result is not None
        shared = rank is not None and ranks.count(rank) > 1
        ranked.append(RankedImage(rank, i, result, None if math.isnan(chance) else chance, shared))
    return ranked


def _std(candidate: Candidate) -> float:
    return math.nan if candidate.result is None else candidate.result.std


def finish(candidates: list[Candidate], keep: int, scorer: PictureScorer, **figures: Any) -> BestOfNOutput:
    """Rank the finished candidates and keep the best."""
    rate(candidates, scorer)
    finished = [index for index, candidate in enumerate(candidates) if candidate.result is not None]
    rivals = [candidates[index] for index in finished]
    if scorer.also or scorer.thresholds:
        ranked = _ranking(rivals, by_sum=scorer.combine == "sum" and not scorer.thresholds)
    else:
        ranked = rank_results([rival.result for rival in rivals if rival.result is not None])
    ranking = [RankedImage(r.rank, finished[r.index], r.result, r.beats_next, r.tied) for r in ranked]
    kept = [candidates[place.index] for place in ranking[:keep]]
    return BestOfNOutput(
        images=[c.picture for c in kept],
        scores=[c.score for c in kept],
        distributions=[place.result.distribution for place in ranking[:keep]],
        seeds=[c.seed for c in kept],
        ranking=ranking,
        records=candidates,
        **figures,
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _facts_of(output: BestOfNOutput, place: int) -> dict[str, Any]:
    """What is known of one candidate, as a line of ``results.jsonl`` holds it; numbers that are NaN are null."""
    candidate = output.records[place]
    result = candidate.result
    return {
        "prompt": output.prompt,
        "seed": candidate.seed,
        "score": _number(candidate.score),
        "std": None if result is None else _number(result.std),
        "value": _number(candidate.value),
        "preview_score": _number(candidate.preview_score),
        "survived": candidate.survived,
        "error": None if result is None else result.error,
        "also": {name: _number(value) for name, value in candidate.extras.items()},
        "missed": candidate.missed,
        "parent": candidate.parent,
        "round": candidate.round,
    }


def _save(output: BestOfNOutput, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"vqr1_metric": __version__, "torch": torch.__version__}
    run = {
        "prompt": output.prompt,
        "strategy": output.strategy,
        "denoiser_rows": output.denoiser_rows,
        "scoring_seconds": output.scoring_seconds,
        "total_seconds": output.total_seconds,
        "interrupted": output.interrupted,
        "trace": [(rows, _number(value)) for rows, value in output.trace],
        **files.plain(output.about),
        "versions": versions,
    }
    lines = [_facts_of(output, place) for place in range(len(output.records))]
    for former in folder.glob("[0-9][0-9]_seed*"):  # kept by an earlier run that is now superseded
        files.remove(former)
    for rank, (image, ranked) in enumerate(zip(output.images, output.ranking, strict=False)):
        line = lines[ranked.index]
        told = {"vqr1": {**line, **files.plain(output.about), "versions": versions}} | {
            name: line[name] for name in ("prompt", "seed", "score")
        }
        line["file"] = files.write(image, folder / f"{rank:02d}_seed{line['seed']}", told).name
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output.images:
        sheet = output.grid()
        files.replace(folder / "contact.png", lambda part: sheet.save(part, format="PNG"))
    files.replace(folder / "run.json", lambda part: part.write_text(json.dumps(run, indent=1), encoding="utf-8"))
    files.replace(folder / "results.jsonl", lambda part: part.write_text(text, encoding="utf-8"))
    return folder
