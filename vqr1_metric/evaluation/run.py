"""From ratings and scores to one dictionary with everything: what tables, pages and JSON files are made of."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from vqr1_metric import __version__
from vqr1_metric.evaluation.agreement import CURVES, Agreement, agreement, fit
from vqr1_metric.evaluation.calibration import calibration
from vqr1_metric.evaluation.columns import Column
from vqr1_metric.evaluation.published import SOURCE, published_rows
from vqr1_metric.evaluation.significance import compare_scorers, holm
from vqr1_metric.ratings.sets import Problem, RatingSet, count_problems

#: So many pictures on which scorer and people disagree most are shown.
WORST = 12
_CURVE_POINTS = 60
_PACKAGES = ("torch", "transformers", "scipy", "numpy", "pillow")


@dataclass(frozen=True)
class Settings:
    """How uncertain figures are computed: probability of intervals, bootstrap resamples, seed."""

    level: float = 0.95
    resamples: int = 1000
    seed: int = 0


def measure(
    labels: RatingSet, columns: Sequence[Column], settings: Settings | None = None, *, group: str | None = None
) -> dict[str, Any]:
    """Everything about one data set.

    The first column is the one the others are compared with.

    Args:
        labels: the images.
        columns: the scores.
        settings: of the intervals.
        group: column of the labels whose equal cells mark images that are not independent.

    Returns:
        ``dataset``, ``scorers``, ``differences``, ``published``; NaN is kept, see
        :func:`vqr1_metric.evaluation.tables.jsonable`.
    """
    settings = settings or Settings()
    opinions = labels.quality
    scenes = [image.scene for image in labels.images] if labels.has_scenes else None
    groups = None if group is None else labels.groups(group)
    problems = list(labels.problems)
    scorers = []
    for column in columns:
        found = agreement(column.scores, opinions, scenes, groups=groups, **asdict(settings))
        problems += _without_score(column, labels)
        scorers.append(
            {
                "name": column.name,
                "kind": column.kind,
                "identity": column.identity,
                **_agreement_json(found),
                "calibration": _calibrate(column, opinions),
                "fit": _fitted(column, labels),
                "worst": _worst(column, labels),
            }
        )
    return {
        "dataset": {
            "name": labels.name,
            "split": labels.split,
            "labelled": len(labels),
            "expected": labels.expected,
            "lower_is_better": labels.lower_is_better,
            "short_edge": labels.short_edge,
            "scenes": len({image.scene for image in labels.images if image.scene}) if scenes else 0,
            "problem_counts": count_problems(problems),
            "problems": [asdict(problem) for problem in problems],
        },
        "scorers": scorers,
        "differences": _differences(columns, opinions, scenes, groups, settings),
        "published": [
            {"name": name, "srcc": srcc, "plcc": plcc, "source": SOURCE}
            for name, srcc, plcc in published_rows(labels.name)
        ],
    }


def provenance(command: str, settings: Settings, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What results were made with: package, versions, command, settings. No time and no place, so that equal runs are
    equal in every byte."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"vqr1_metric": __version__, "command": command, **asdict(settings), "versions": versions, **(extra or {})}


def _agreement_json(found: Agreement) -> dict[str, Any]:
    table = asdict(found)
    return {**table, "intervals": {name: list(ends) for name, ends in table["intervals"].items()}}


def _without_score(column: Column, labels: RatingSet) -> list[Problem]:
    problems = []
    for item, row, score in zip(labels.images, column.rows, column.scores, strict=True):
        if math.isnan(score):
            why = "not in the file of scores" if row is None else row.get("error") or "its score is not a number"
            problems.append(Problem("no score", item.name, f"{column.name}: {why}"))
    return problems


def _calibrate(column: Column, opinions: Sequence[float]) -> dict[str, Any] | None:
    stds = column.values("std")
    if all(math.isnan(std) for std in stds):
        return None
    # A picture without a score is left out by its score; its missing distribution must not hide the others'.
    rows = [row.get("probabilities") if row else None for row in column.rows]
    known = [i for i, score in enumerate(column.scores) if not math.isnan(score)]
    return calibration(
        [column.scores[i] for i in known],
        [stds[i] for i in known],
        [opinions[i] for i in known],
        [rows[i] for i in known] if not column.lower_is_better else None,
    )


def _fitted(column: Column, labels: RatingSet) -> dict[str, Any] | None:
    """Points of the fitted maps, for the scatter plot, in the labels' own direction and units."""
    x, y = np.asarray(column.scores), np.asarray(labels.quality)
    known = np.isfinite(x)
    if not known.any() or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return None
    at = np.linspace(x[known].min(), x[known].max(), _CURVE_POINTS)
    sign = -1.0 if labels.lower_is_better else 1.0
    curves = {name: curve(at) for name in CURVES if (curve := fit(x[known], y[known], name)) is not None}
    return {"x": at.tolist(), **{f"y_{name}": (sign * values).tolist() for name, values in curves.items()}}


def _worst(column: Column, labels: RatingSet) -> list[dict[str, Any]]:
    """Pictures whose mapped score is furthest from the opinion, in the labels' own direction and units."""
    x, y = np.asarray(column.scores), np.asarray(labels.quality)
    known = np.flatnonzero(np.isfinite(x))
    curve = fit(x[known], y[known], "4") if len(known) else None
    if curve is None:
        return []
    sign = -1.0 if labels.lower_is_better else 1.0
    mapped = dict(zip(known.tolist(), curve(x[known]).tolist(), strict=True))
    order = sorted(mapped, key=lambda i: (-abs(mapped[i] - y[i]), i))[:WORST]
    return [
        {
            "image": labels.images[i].name,
            "mos": labels.images[i].mos,
            "score": column.values("score")[i],
            "expected": sign * mapped[i],
            "overrated": bool(mapped[i] > y[i]),
        }
        for i in order
    ]


def _differences(
    columns: Sequence[Column],
    opinions: Sequence[float],
    scenes: Sequence[str | None] | None,
    groups: Sequence[str | None] | None,
    settings: Settings,
) -> list[dict[str, Any]]:
    if len(columns) < 2:
        return []
    main, *others = columns
    found = [
        compare_scorers(main.scores, other.scores, opinions, scenes, groups=groups, **asdict(settings))
        for other in others
    ]
    corrected = holm([difference.p for difference in found])
    return [
        {"scorer": main.name, "other": other.name, **asdict(difference), "p_holm": p}
        for other, difference, p in zip(others, found, corrected, strict=True)
    ]


def __getattr__(name: str) -> object:
    if name == "evaluate":
        raise ImportError(f"{__name__}.{name} of version 0.1.0 is now vqr1_metric.evaluation.evaluate.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
