"""Pages that open offline: one HTML file each, light and dark, nothing fetched. Needs Jinja2."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqr1_metric.evaluation.agreement import STATISTICS
from vqr1_metric.evaluation.columns import Column
from vqr1_metric.evaluation.plots import Plot, histogram
from vqr1_metric.evaluation.tables import HEADINGS, jsonable, short, value_and_interval
from vqr1_metric.evaluation.thumbnails import SIZE, thumbnail
from vqr1_metric.functional.distribution import MAX_SCORE, MIN_SCORE, STEPS_PER_UNIT
from vqr1_metric.ratings.sets import RatingSet, problems_text

#: A distribution is drawn with bars a tenth of a score wide.
_BINS = 40


def render(template: str, **values: Any) -> str:
    """A template of this package, filled; every text is escaped."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ValueError("Expected Jinja2 for a page, but it is not installed: pip install jinja2") from None
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def report_page(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    made_with: Mapping[str, Any],
    page: Path,
    cache: Path,
    *,
    size: int = SIZE,
    progress: Callable[[], object] = lambda: None,
) -> str:
    """A page of scored pictures: sortable, filterable, with distributions and reasoning.

    Args:
        rows: of a file of scores, with ``file``, the path of the picture.
        title: heading.
        made_with: shown at the foot.
        page: where the page will be, for links to the pictures.
        cache: folder of the thumbnails.
        size: longer edge of the thumbnails.
        progress: called after each picture.
    """
    cards = []
    for row in rows:
        cards.append(_card(row, page, cache, size))
        progress()
    scores = [card["s"] for card in cards if card["s"] is not None]
    plot = ""
    if scores:
        edges, counts = histogram(scores, MIN_SCORE, MAX_SCORE, _BINS)
        plot = str(Plot((MIN_SCORE, MAX_SCORE), (0, max(counts)), "score", "pictures", title).bars(edges, counts))
    summary = {
        "pictures": len(cards),
        "failed": len(cards) - len(scores),
        "mean": f"{sum(scores) / len(scores):.3f}" if scores else "–",
        "unreliable": sum(card["u"] for card in cards),
    }
    return render(
        "report.html", title=title, summary=summary, plot=plot, rows=script_json(cards), made_with=_flat(made_with)
    )


def evaluation_page(
    sets: Sequence[Mapping[str, Any]],
    data: Sequence[tuple[RatingSet, Sequence[Column]]],
    made_with: Mapping[str, Any],
    cache: Path,
) -> str:
    """The page of an evaluation: tables, scatter plots with the fits, uncertainty, worst disagreements.

    Args:
        sets: results of :func:`vqr1_metric.evaluation.run.evaluate`.
        data: labels and scorers of each.
        made_with: of :func:`vqr1_metric.evaluation.run.provenance`.
        cache: folder of the thumbnails.
    """
    sections = []
    for entry, (labels, columns) in zip(sets, data, strict=True):
        shown = [name for name in HEADINGS if name != "scene_srcc" or entry["dataset"]["scenes"]]
        table = [
            {
                "name": row["name"],
                "n": row["n"],
                "cells": [value_and_interval(name, row["values"][name], row["intervals"][name]) for name in shown],
                "why": row["reasons"].get("srcc"),
            }
            for row in entry["scorers"]
        ]
        published = [
            {"name": row["name"], "cells": [short(name, row[name]) if name in row else "" for name in shown]}
            for row in entry["published"]
        ]
        scorers = [
            {
                "name": row["name"],
                "kind": row["kind"],
                "scatter": str(scatter(row, column, labels) or ""),
                "calibration": _calibration_plots(row),
                "figures": _figures(row["calibration"]),
                "worst": _worst(row, labels, cache) if row["kind"] == "model" or len(columns) == 1 else [],
            }
            for row, column in zip(entry["scorers"], columns, strict=True)
        ]
        sections.append(
            {
                **entry,
                "headings": [(HEADINGS[name], STATISTICS[name]) for name in shown],
                "table": table,
                "published_table": published,
                "plots": scorers,
                "counts": problems_text(entry["dataset"]["problem_counts"]),
            }
        )
    return render("evaluation.html", title="Agreement with people", sections=sections, made_with=_flat(made_with))


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(jsonable(value), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _card(row: Mapping[str, Any], page: Path, cache: Path, size: int) -> dict[str, Any]:
    """What the page's script needs of a picture, under short names."""
    known = row.get("score") is not None and not math.isnan(row["score"])
    replies = [
        {"s": reply.get("score"), "t": reply.get("reasoning") or "", "e": reply.get("reason")}
        for reply in row.get("replies") or []
    ]
    coverage, tag = row.get("coverage"), row.get("tag_probability")
    parts = [value for value in (coverage, tag) if value is not None and not math.isnan(value)]
    return {
        "n": row["path"],
        "f": _link(row["file"], page),
        "t": thumbnail(row["file"], cache, size),
        "s": row["score"] if known else None,
        "d": row.get("std"),
        "l": row.get("low"),
        "h": row.get("high"),
        "c": coverage,
        "u": known and bool(parts) and min(parts) < 0.5,
        "e": None if known else row.get("error") or "no score",
        "p": _bars(row.get("probabilities")),
        "r": replies,
    }


def _link(path: Path, page: Path) -> str:
    from urllib.parse import quote

    return quote(os.fsencode(Path(os.path.relpath(path, page.parent)).as_posix()))


def _bars(probabilities: Sequence[float] | None) -> list[int] | None:
    """Heights in percent of the highest bar: the 401 probabilities in bins of a tenth, 1.00 in the first."""
    if probabilities is None:
        return None
    width = STEPS_PER_UNIT * 4 // _BINS
    sums = [sum(probabilities[i * width + 1 : (i + 1) * width + 1]) for i in range(_BINS)]
    sums[0] += probabilities[0]
    return [round(99 * value / max(sums)) for value in sums]


def scatter(row: Mapping[str, Any], column: Column, labels: RatingSet) -> Plot | None:
    """Scores against opinions with the fitted maps; None without a score.

    Args:
        row: of the scorer, in the results of :func:`vqr1_metric.evaluation.run.evaluate`.
    """
    points = [
        (score, item.mos) for score, item in zip(column.scores, labels.images, strict=True) if not math.isnan(score)
    ]
    if not points:
        return None
    x, y = [p[0] for p in points], [p[1] for p in points]
    plot = Plot((min(x), max(x)), (min(y), max(y)), row["name"], "opinion", f"{row['name']} against opinions")
    plot.dots(points)
    fitted = row["fit"] or {}
    for name in ("4", "5"):
        if f"y_{name}" in fitted:
            plot.line(list(zip(fitted["x"], fitted[f"y_{name}"], strict=True)), f"fit{name}")
    return plot


def _calibration_plots(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = row["calibration"]
    if not found or "reason" in found:
        return []
    levels = [(float(level), share) for level, share in found["coverage"].items()]
    coverage = Plot((0, 1), (0, 1), "stated probability", "labels inside", "coverage of the intervals")
    coverage.line([(0, 0), (1, 1)], "ideal").line(levels, "line").dots(levels, "mark")
    bins = found["bins"]
    top = max(max(pair) for pair in bins)
    sizes = Plot((0, top), (0, top), "stated standard deviation", "error (RMSE)", "standard deviation against error")
    sizes.line([(0, 0), (top, top)], "ideal").line(bins, "line").dots(bins, "mark")
    risk = [(share, value) for share, value, _ in found["risk"]]
    best = [(share, value) for share, _, value in found["risk"]]
    kept = Plot((0, 1), (0, max(p[1] for p in risk)), "share kept, most certain first", "RMSE", "risk and coverage")
    kept.line([(0, found["rmse"]), (1, found["rmse"])], "ideal").line(best, "best").line(risk, "line")
    return [
        ("coverage of its intervals", str(coverage)),
        ("its standard deviation against its error", str(sizes)),
        ("error when the least certain are dropped (dashed: chance; thin: the best possible)", str(kept)),
    ]


def _figures(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    if "reason" in found:
        return str(found["reason"])
    return (
        f"rank correlation of standard deviation and error {found['std_error_srcc']:.3f}; standard deviations would be "
        f"right if multiplied by {found['scale']:.2f}; calibration error (ENCE) {found['ence']:.2f}"
    )


def _worst(row: Mapping[str, Any], labels: RatingSet, cache: Path) -> list[dict[str, Any]]:
    paths = {item.name: item.path for item in labels.images}
    return [
        {
            **entry,
            "thumbnail": thumbnail(Path(paths[entry["image"]] or ""), cache) or "",
            "text": f"people {entry['mos']:.3g}, expected of its score {entry['score']:.2f}: {entry['expected']:.3g}",
        }
        for entry in row["worst"]
    ]


def _flat(made_with: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and value lines, nested tables in one line each."""
    lines = []
    for key, value in made_with.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None)
        if value is not None:
            lines.append((key, str(value)))
    return lines
