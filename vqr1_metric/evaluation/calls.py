"""The calls behind ``vqr1 evaluate``: does a scorer agree with people, with votes, with distortions?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vqr1_metric.evaluation.baselines import BASELINES, LUMA
from vqr1_metric.evaluation.columns import Column, Progress, Source, gather, model_name, no_progress
from vqr1_metric.evaluation.ladder import check_distortions, ladder_pictures, ladder_statistics
from vqr1_metric.evaluation.preference import preference_agreement
from vqr1_metric.evaluation.report import LadderReport, RatingReport, Report, VoteReport
from vqr1_metric.evaluation.run import Settings, measure, provenance
from vqr1_metric.evaluation.scoring import made_by, process_rank, score_pictures
from vqr1_metric.images.distortions import LEVELS
from vqr1_metric.ratings import RatingError, RatingSet, read_ratings
from vqr1_metric.scorer import QualityScorer


def evaluate(
    scorer: Source | Mapping[str, Source],
    ratings: RatingSet | str | Path | Sequence[RatingSet | str | Path],
    against: Mapping[str, Source] | Sequence[Source] = (),
    *,
    images: str | Path | None = None,
    group: str | None = None,
    pyiqa: Sequence[str] = (),
    lower_is_better: Sequence[str] = (),
    baselines: bool = True,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
    command: str = "vqr1_metric.evaluation.evaluate",
    device: str | None = None,
) -> Report:
    """How well do scores agree with what people said, how surely, and better than others?

    Args:
        scorer: a model, or scores made before: a file, or name of the image -> score. Several as name -> scorer.
        ratings: what people said, read or as a label file; opinion scores or votes. Of scores several sets.
        against: others, of the same kinds, that the first is compared with.
        images: folder of the images of label files.
        group: column of the labels whose equal cells mark images that are not independent.
        pyiqa: metrics of pyiqa, by name, as others.
        lower_is_better: names of scores that are better when lower.
        baselines: let two scorers without parameters take part, which a model must beat.
        level, resamples, seed: of the intervals.
        cache: keep the models' scores in this folder, and use those that are there.
        progress: makes a progress bar of a label and a total.
        command: what the report says it was made with.
        device: of pyiqa's metrics.

    Returns:
        A :class:`~vqr1_metric.evaluation.report.RatingReport`, for votes a
        :class:`~vqr1_metric.evaluation.report.VoteReport`.

    Raises:
        RatingError: ratings that cannot be used, scorers that cannot be told apart.

    Example::

        report = evaluate(QualityScorer("nano"), "labels.csv", {"NIQE": "niqe.csv"}, lower_is_better=["NIQE"])
        print(report.markdown())
        report.save("results/")
    """
    given = [ratings] if isinstance(ratings, RatingSet | str | Path) else list(ratings)
    read = [s if isinstance(s, RatingSet) else read_ratings(s, images, strict=False) for s in given]
    sets = [part for s in read for part in ([s] if s.preferences else s.by_dataset())]
    votes = [s for s in sets if s.preferences]
    if not sets or (votes and len(sets) > 1):
        raise RatingError(
            f"Expected sets of scores, or one set of votes, but got {len(sets)} of which {len(votes)} votes."
        )
    for s in sets:
        if not s.images:
            names = ", ".join(problem.subject for problem in s.problems[:3])
            raise RatingError(f"Expected pictures of {s.name!r}, but none of them was found ({names}, ...).")
        if not votes:
            _ = s.quality  # the direction must be settled
        if group is not None:
            s.groups(group)
    settings = Settings(level, resamples, seed)
    with _folder(cache) as folder:
        contenders = gather(
            scorer,
            against,
            pyiqa=pyiqa,
            lower_is_better=lower_is_better,
            baselines=baselines,
            cache=folder,
            progress=progress,
            device=device,
        )
        data = [(s, contenders.columns(s)) for s in sets]
    if process_rank()[0] > 0:
        return Report({})
    models = {column.name: column.identity for _, columns in data for column in columns if column.identity}
    named = models if len(models) > 1 else {"model": next(iter(models.values()), None)}
    made_with = provenance(command, settings, named)
    if votes:
        s, columns = data[0]
        return VoteReport(made_with, s.name, _votes(s, columns, settings), s)
    return RatingReport(made_with, [measure(s, columns, settings, group=group) for s, columns in data], data)


def evaluate_ladder(
    scorer: QualityScorer,
    folder: str | Path,
    distortions: Sequence[str] | None = None,
    *,
    max_edge: int | None = None,
    baselines: bool = True,
    level: float = 0.95,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
    command: str = "vqr1_metric.evaluation.evaluate_ladder",
) -> Report:
    """How steadily does a score fall as undistorted pictures are distorted, step by step?

    Args:
        scorer: a model.
        folder: undistorted pictures.
        distortions: names out of :data:`vqr1_metric.images.distortions.DISTORTIONS`; None takes all.
        max_edge: pictures are reduced to this longer edge first.
        baselines, level, cache, progress, command: as for :func:`evaluate`.
        seed: of the noise.

    Raises:
        RatingError: an unknown distortion, or no picture in the folder.
    """
    names = check_distortions(distortions)
    pictures, rungs = ladder_pictures(Path(folder), names, seed, max_edge)
    with _folder(cache) as kept, progress("ladder", len({key for key, _ in rungs})) as bar:
        rows = score_pictures(scorer, rungs, kept, bar.update)
    if process_rank()[0] > 0:
        return Report({})
    scores = {model_name(scorer): [math.nan if row["score"] is None else row["score"] for row in rows]}
    if baselines:
        measured = []
        with progress("baselines", len(rungs)) as bar:
            for _, picture in rungs:
                grey = picture().astype(np.float64) @ np.array(LUMA)
                measured.append({name: function(grey) for name, function in BASELINES.items()})
                bar.update(1)
        scores |= {name: [row[name] for row in measured] for name in BASELINES}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in scores.items():
        cube = np.array(values).reshape(len(pictures), len(names), LEVELS + 1)
        found[name] = {n: ladder_statistics(cube[:, i], level=level) for i, n in enumerate(names)}
    made_with = provenance(command, Settings(level, 0, seed), {"model": made_by(scorer)})
    return LadderReport(made_with, pictures, names, found)


def _votes(ratings: RatingSet, columns: Sequence[Column], settings: Settings) -> dict[str, dict[str, Any]]:
    found = {}
    for column in columns:
        scores = {image.name: score for image, score in zip(ratings.images, column.scores, strict=True)}
        found[column.name] = {"kind": column.kind, **preference_agreement(ratings, scores, **asdict(settings))}
    return found


@contextmanager
def _folder(cache: str | Path | None) -> Iterator[Path]:
    if cache is not None:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
