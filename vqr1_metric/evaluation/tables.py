"""Results as files: a Markdown table, a CSV table, one JSON file with everything, the scores of every picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqr1_metric.evaluation.agreement import STATISTICS
from vqr1_metric.evaluation.columns import Column
from vqr1_metric.ratings.sets import RatingSet, problems_text
from vqr1_metric.score_files import cell

#: Statistics of the Markdown table and their headings; CSV and JSON hold all of them.
HEADINGS = {
    "srcc": "SRCC",
    "plcc": "PLCC",
    "plcc_4": "PLCC (4)",
    "plcc_5": "PLCC (5)",
    "krcc": "KRCC",
    "rmse_4": "RMSE (4)",
    "pairwise": "pairs",
    "scene_srcc": "SRCC in scenes",
}
_CORRELATIONS = ("srcc", "plcc", "plcc_4", "plcc_5", "krcc", "scene_srcc")


def jsonable(value: Any) -> Any:
    """The same with None for NaN and infinity, lists for tuples, floats rounded to 9 significant digits."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8; bytes of a picture's name that are not UTF-8 become ``\\udcXX``, which JSON reads back."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Everything, NaN as null."""
    write_text(path, json.dumps(jsonable(results), indent=1, ensure_ascii=False) + "\n")


#: Columns of the CSV table that say what a line was made with.
_MODEL = ("model", "revision", "mode", "question")
_MADE_WITH = (*_MODEL, "vqr1_metric", "level", "resamples", "seed", "command")


def write_table_csv(path: Path, sets: Sequence[Mapping[str, Any]], made_with: Mapping[str, Any]) -> None:
    """One line for each scorer of each data set: all statistics with the ends of their intervals, and their making."""
    columns = ["dataset", "split", "scorer", "kind", "n", "left_out"]
    columns += [f"{name}{end}" for name in STATISTICS for end in ("", "_low", "_high")]
    columns += _MADE_WITH
    lines = []
    for entry in sets:
        dataset = entry["dataset"]
        for row in entry["scorers"]:
            line = [cell(dataset["name"]), dataset["split"], cell(row["name"]), row["kind"], row["n"], row["left_out"]]
            for name in STATISTICS:
                line += [_number(row["values"][name]), *(_number(end) for end in row["intervals"][name])]
            known = {**made_with, **dict.fromkeys(_MODEL), **(row["identity"] or {})}
            line += ["" if known[name] is None else cell(str(known[name])) for name in _MADE_WITH]
            lines.append(line)
        for row in entry["published"]:
            known = {"srcc": row["srcc"], "plcc": row["plcc"]}
            line = [cell(dataset["name"]), "", row["name"], "published", "", ""]
            for name in STATISTICS:
                line += [_number(known.get(name, math.nan)), "", ""]
            line += [*[""] * (len(_MADE_WITH) - 1), row["source"]]
            lines.append(line)
    _write_csv(path, columns, lines)


def write_scores_csv(path: Path, labels: RatingSet, columns: Sequence[Column]) -> None:
    """One line for each picture: label and every scorer's score, as they are (no direction turned)."""
    header = ["image", "mos", "std", "scene", "method", "split", *(cell(column.name) for column in columns)]
    scores = [column.values("score") for column in columns]
    lines = [
        [
            cell(item.name),
            _number(item.mos),
            _number(item.std),
            cell(item.scene or ""),
            cell(item.method or ""),
            cell(item.split or ""),
            *(_number(values[i]) for values in scores),
        ]
        for i, item in enumerate(labels.images)
    ]
    _write_csv(path, header, lines)


def markdown(sets: Sequence[Mapping[str, Any]], made_with: Mapping[str, Any]) -> str:
    """The tables a reader needs, measured and published rows apart, with what was left out and how it was made."""
    parts = []
    for entry in sets:
        parts += [_heading(entry["dataset"]), _main_table(entry), _notes(entry)]
    if len(sets) > 1:
        parts.append(_means(sets))
    parts.append(made_with_text(made_with))
    return "\n".join(part for part in parts if part)


def _heading(dataset: Mapping[str, Any]) -> str:
    split = "" if dataset["split"] == "all" else f", split {dataset['split']}"
    count = f"{dataset['labelled']} pictures"
    if dataset["expected"] and dataset["expected"] != dataset["labelled"]:
        count += f" of {dataset['expected']}: this is not the complete set"
    return f"## {dataset['name']}{split} ({count})\n"


def _main_table(entry: Mapping[str, Any]) -> str:
    shown = [name for name in HEADINGS if name != "scene_srcc" or entry["dataset"]["scenes"]]
    lines = [["scorer", "n", *(HEADINGS[name] for name in shown)]]
    for row in entry["scorers"]:
        cells = [row["name"], str(row["n"])]
        cells += [with_interval(name, row["values"][name], row["intervals"][name]) for name in shown]
        lines.append(cells)
    for row in entry["published"]:
        known = {"srcc": row["srcc"], "plcc": row["plcc"]}
        cells = [f"*{row['name']} (published)*", ""]
        lines.append(cells + [f"*{short(name, known[name])}*" if name in known else "" for name in shown])
    return table(lines)


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head, the first column is left-aligned, the others to the right."""
    clean = [[text.replace("|", "\\|") for text in line] for line in lines]
    head, *body = clean
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body)) + "\n"


def _notes(entry: Mapping[str, Any]) -> str:
    lines = []
    for row in entry["scorers"]:
        for name in ("srcc", "plcc_4", "plcc_5"):
            if row["reasons"].get(name):
                lines.append(f"- {row['name']}, {HEADINGS[name]}: {row['reasons'][name]}.")
                break
    for row in entry["differences"]:
        if row["reason"]:
            lines.append(f"- {row['scorer']} against {row['other']}: {row['reason']}.")
            continue
        low, high = row["interval"]
        lines.append(
            f"- {row['scorer']} against {row['other']}: SRCC {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
            f"p = {_p(row['p'])} ({_p(row['p_holm'])} after Holm), Williams p = {_p(row['p_williams'])}."
        )
    for row in entry["scorers"]:
        lines += _calibration_note(row)
    counts = entry["dataset"]["problem_counts"]
    if counts:
        lines.append(f"- Left out or noted (listed in results.json): {problems_text(counts)}.")
    if entry["dataset"]["short_edge"]:
        lines.append(f"- Pictures reduced to a short edge of {entry['dataset']['short_edge']}.")
    return "\n".join(lines) + "\n" if lines else ""


def _calibration_note(row: Mapping[str, Any]) -> list[str]:
    found = row["calibration"]
    if not found or "reason" in found:
        return []
    coverage = ", ".join(f"{float(level):.0%}: {share:.0%}" for level, share in found["coverage"].items())
    return [
        f"- {row['name']}, its own uncertainty: rank correlation of standard deviation and error "
        f"{found['std_error_srcc']:.3f}; standard deviations would be right if multiplied by {found['scale']:.2f}; "
        f"share of the labels inside its intervals: {coverage}."
    ]


def _means(sets: Sequence[Mapping[str, Any]]) -> str:
    """Mean over the data sets for each scorer that has them all."""
    names = list(dict.fromkeys(row["name"] for entry in sets for row in entry["scorers"]))
    lines = [["scorer", "data sets", "SRCC", "PLCC", "PLCC (4)"]]
    for name in names:
        rows = [row for entry in sets for row in entry["scorers"] if row["name"] == name]
        if len(rows) == len(sets):
            means = [sum(row["values"][key] for row in rows) / len(rows) for key in ("srcc", "plcc", "plcc_4")]
            lines.append([name, str(len(rows)), *(short("srcc", mean) for mean in means)])
    return "## Mean over the data sets\n\n" + table(lines)


def made_with_text(made_with: Mapping[str, Any]) -> str:
    """How results were made, as Markdown."""
    from vqr1_metric.backends.files import CONTENT

    versions = ", ".join(f"{name} {value}" for name, value in made_with["versions"].items())
    lines = [
        "## How this was made\n",
        f"    {made_with['command']}\n",
        f"- vqr1_metric {made_with['vqr1_metric']}; {versions}",
        f"- {made_with['level']:.0%} intervals by the jackknife, for more than 50 pictures or scenes by "
        f"{made_with['resamples']} bootstrap resamples, seed {made_with['seed']}; the logistic maps are fitted once.",
    ]
    for identity in made_with.values():
        if isinstance(identity, dict) and "question" in identity:  # hashes are in results.json
            told = {key: value for key, value in identity.items() if value is not None and key not in CONTENT}
            lines.append("- " + ", ".join(f"{key} {value}" for key, value in told.items()))
    return "\n".join(lines) + "\n"


def preference_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of an agreement with votes."""
    lines = [["scorer", "pairs", "votes met", "of reach", "majority", "best of scene"]]
    for name, row in found.items():
        if "reason" in row:
            lines.append([name, "0", row["reason"], "", "", ""])
            continue
        best = "" if row["best_met"] is None else _share(row["best_met"])
        lines.append(
            [name, str(row["pairs"]), *(_share(row[key]) for key in ("votes_met", "of_reach", "majority")), best]
        )
    known = next((row for row in found.values() if "reason" not in row), None)
    if known is None:
        return table(lines)
    best = "–" if known["best_ceiling"] is None else _share(known["best_ceiling"])
    chance = "–" if known["best_chance"] is None else _share(known["best_chance"])
    lines += [["*ceiling: always with the majority*", "", _share(known["ceiling"]), "1", "1", best]]
    lines += [["*chance*", "", ".500", "0", ".500", chance]]
    notes = f"\n{known['scenes']} scenes, {known['votes']:g} votes in pairs; intervals are about other scenes."
    if known["scenes"] < 10:
        notes += " So few scenes test the path, they are no result."
    return table(lines) + notes + "\n"


def _share(value: tuple[float, float, float]) -> str:
    share, low, high = value
    if math.isnan(share):
        return "–"
    ends = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f"{share:.3f}{ends}"


def with_interval(name: str, value: float, interval: Sequence[float]) -> str:
    """A statistic with its interval, as in a Markdown table: ``.704 [.637, .760]``."""
    return " ".join(value_and_interval(name, value, interval)).rstrip()


def value_and_interval(name: str, value: float, interval: Sequence[float]) -> tuple[str, str]:
    """The two parts of :func:`with_interval`; the second is empty where there is no interval."""
    if math.isnan(value) or math.isnan(interval[0]):
        return short(name, value), ""
    return short(name, value), f"[{short(name, interval[0])}, {short(name, interval[1])}]"


def short(name: str, value: float) -> str:
    """Three decimals; correlations without the leading zero, as is customary."""
    if math.isnan(value):
        return "–"
    text = f"{value:.3f}" if name in _CORRELATIONS or name == "pairwise" else f"{value:.3g}"
    return text.replace("0.", ".", 1) if name in _CORRELATIONS and abs(value) < 1 and text != "1.000" else text


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"


def _write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_text(path, text.getvalue())
