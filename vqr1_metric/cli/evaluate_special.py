"""``vqr1 evaluate --preferences`` and ``--ladder``: votes, and steps of distortion, instead of opinion scores."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.evaluate import read_label_file
from vqr1_metric.cli.scorers import cache_folder, columns, make_peers, model_name, progress_bar, with_bar
from vqr1_metric.evaluation.baselines import BASELINES, LUMA
from vqr1_metric.evaluation.ladder import check_distortions, ladder_pictures, ladder_statistics, ladder_table
from vqr1_metric.evaluation.preference import preference_agreement
from vqr1_metric.evaluation.run import Settings, provenance
from vqr1_metric.evaluation.scoring import made_by, process_rank, score_pictures
from vqr1_metric.evaluation.tables import made_with_text, table, write_json, write_text
from vqr1_metric.images.distortions import LEVELS
from vqr1_metric.ratings.sets import count_problems, problems_text
from vqr1_metric.scorer import QualityScorer


def run_preferences(args: argparse.Namespace, scorer: QualityScorer | None, settings: Settings, command: str) -> int:
    """Agreement with votes."""
    labels = read_label_file(args.preferences, args)
    if not labels.preferences:
        raise CommandError(f"{args.preferences}: holds scores of pictures, not votes: give it with --labels")
    peers = make_peers(args)
    args.output.mkdir(parents=True, exist_ok=True)
    scorers = columns(args, scorer, peers, labels.images, labels.name)
    if process_rank()[0] > 0:
        return 0
    found = {}
    for column in scorers:
        scores = {item.name: score for item, score in zip(labels.images, column.scores, strict=True)}
        found[column.name] = {"kind": column.kind, **preference_agreement(labels, scores, **asdict(settings))}
    made_with = provenance(command, settings, {"model": scorers[0].identity})
    problems = labels.problems
    results = {
        "made_with": made_with,
        "preferences": labels.name,
        "problems": [asdict(problem) for problem in problems],
        "scorers": found,
    }
    text = f"## {labels.name}\n\n{_preference_text(found)}"
    if problems:
        text += f"\n- Left out or noted (listed in results.json): {problems_text(count_problems(problems))}.\n"
    _finish(args, results, text)
    return 0


def run_ladder(args: argparse.Namespace, scorer: QualityScorer | None, settings: Settings, command: str) -> int:
    """Monotonicity along each distortion."""
    if scorer is None:
        raise CommandError("--ladder distorts the pictures itself: it needs a --model, not --scores")
    if args.against or args.pyiqa:
        raise CommandError("--ladder compares the model with the baselines only: leave out --against and --pyiqa")
    names = check_distortions(args.distortion)
    pictures, rungs = ladder_pictures(args.ladder, names, args.bootstrap_seed, args.max_edge)
    args.output.mkdir(parents=True, exist_ok=True)
    identity = made_by(scorer)
    with progress_bar(args, "ladder", len({key for key, _ in rungs})) as bar:
        rows = score_pictures(scorer, rungs, cache_folder(args), bar.update)
    if process_rank()[0] > 0:
        return 0
    shape = (len(pictures), len(names), LEVELS + 1)
    scores = {model_name(identity): [math.nan if row["score"] is None else row["score"] for row in rows]}
    if not args.no_baselines:
        measured = with_bar(args, "baselines", rungs, lambda rung: _baselines(rung[1]()))
        scores |= {name: [row[name] for row in measured] for name in BASELINES}
    found: dict[str, dict[str, Any]] = {}
    for scorer_name, values in scores.items():
        cube = np.array(values).reshape(shape)
        found[scorer_name] = {name: ladder_statistics(cube[:, i], **asdict(settings)) for i, name in enumerate(names)}
    made_with = provenance(command, settings, {"model": identity})
    results = {"made_with": made_with, "pictures": pictures, "distortions": names, "scorers": found}
    head = f"## Distortion ladder: {len(pictures)} pictures, {len(names)} distortions, {LEVELS} levels\n\n"
    _finish(args, results, head + table(ladder_table(found)))
    return 0


def _baselines(pixels: np.ndarray) -> dict[str, float]:
    grey = pixels.astype(np.float64) @ np.array(LUMA)
    return {name: function(grey) for name, function in BASELINES.items()}


def _preference_text(found: dict[str, dict]) -> str:
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
    notes = f"\n{known['scenes']} scenes, {known['votes']:g} votes in pairs; intervals from resampling scenes."
    if known["scenes"] < 10:
        notes += " So few scenes test the path, they are no result."
    return table(lines) + notes + "\n"


def _share(value: tuple[float, float, float]) -> str:
    share, low, high = value
    if math.isnan(share):
        return "–"
    ends = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f"{share:.3f}{ends}"


def _finish(args: argparse.Namespace, results: dict, text: str) -> None:
    text += "\n" + made_with_text(results["made_with"])
    write_text(args.output / "table.md", text)
    write_json(args.output / "results.json", results)
    if not args.silent:
        print(text)
        print(f"results in {args.output}")
