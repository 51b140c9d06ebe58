"""The scorers that an evaluation compares: the model or a file of scores, then others, then the baselines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vqr1_metric.cli import CommandError
from vqr1_metric.evaluation.baselines import BASELINES, baseline_scores
from vqr1_metric.evaluation.labels import Item
from vqr1_metric.evaluation.peers import match_scores, pyiqa_metric, read_scores
from vqr1_metric.evaluation.run import Column
from vqr1_metric.evaluation.scoring import process_rank, score_items, scorer_identity
from vqr1_metric.scorer import QualityScorer


def columns(
    args: argparse.Namespace,
    scorer: QualityScorer | None,
    items: Sequence[Item],
    name: str,
    short_edge: int | None = None,
) -> list[Column]:
    """The scorers of one data set, the one that the others are compared with first.

    Args:
        args: of ``vqr1 evaluate``.
        scorer: the model; None takes the scores of ``--scores``.
        items: pictures with a path.
        name: of the data set, for the progress bar.
        short_edge: the data set's resizing.
    """
    if scorer is None:
        found = [_from_file(args.scores, args, items, name)]
    else:
        with progress_bar(args, name, len({item.path for item in items})) as bar:
            rows = score_items(scorer, items, cache_folder(args), short_edge, bar.update)
        identity = scorer_identity(scorer, short_edge)
        found = [Column(model_name(identity), "model", rows, identity=identity)]
    if process_rank()[0] > 0:
        return found  # the first process does the rest
    found += [_from_file(told, args, items, name) for told in args.against]
    for metric_name in args.pyiqa:
        metric = pyiqa_metric(metric_name, args.device)
        scores = with_bar(args, metric_name, items, lambda item, metric=metric: metric(item.path, short_edge))
        found.append(Column(metric_name, "pyiqa", [{"score": score} for score in scores]))
    if not args.no_baselines:
        rows = with_bar(args, "baselines", items, lambda item: baseline_scores(item.path, short_edge))
        found += [Column(baseline, "baseline", [{"score": row[baseline]} for row in rows]) for baseline in BASELINES]
    return found


def cache_folder(args: argparse.Namespace) -> Path:
    """Where scores are kept."""
    return args.cache or args.output / "cache"


def model_name(identity: dict[str, Any]) -> str:
    """What tables call a model: its name without its folder, with the mode if that is not the usual one."""
    name = Path(identity["model"]).name
    return name if identity["mode"] == "score" else f"{name} ({identity['mode']})"


def progress_bar(args: argparse.Namespace, name: str, total: int):
    """A bar with the time left, on stderr."""
    from tqdm import tqdm

    rank, processes = process_rank()
    label = name if processes == 1 else f"{name} (process {rank + 1} of {processes})"
    interval = 0.2 if sys.stderr.isatty() else 10.0  # in a log file every refresh is a line of its own
    return tqdm(
        total=total, desc=label, unit="picture", file=sys.stderr, mininterval=interval, disable=args.silent, leave=False
    )


def with_bar(args: argparse.Namespace, name: str, things: Iterable, function: Callable) -> list:
    """``[function(thing) for thing in things]`` with a bar."""
    things = list(things)
    with progress_bar(args, name, len(things)) as bar:
        found = []
        for thing in things:
            found.append(function(thing))
            bar.update()
    return found


def _from_file(told: str, args: argparse.Namespace, items: Sequence[Item], dataset: str) -> Column:
    name, _, path = told.rpartition("=")
    path = Path(path)
    name = name or path.stem
    rows = match_scores(read_scores(path), items)
    if not any(rows):
        raise CommandError(f"{path}: holds a score for none of the {len(items)} pictures of {dataset}")
    return Column(name, "scores", rows, lower_is_better=name in args.lower_better)
