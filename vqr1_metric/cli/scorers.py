"""The scorers that an evaluation compares: the model or a file of scores, then others, then the baselines."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import progress
from vqr1_metric.evaluation.baselines import BASELINES, baseline_scores
from vqr1_metric.evaluation.peers import match_scores, pyiqa_metric, read_scores
from vqr1_metric.evaluation.run import Column
from vqr1_metric.evaluation.scoring import made_by, process_rank, score_items
from vqr1_metric.ratings import RatedImage
from vqr1_metric.scorer import QualityScorer


@dataclass(frozen=True)
class Peers:
    """What stands beside the model, made before a picture is scored: what is wrong with it should not come out later.

    Args:
        files: name -> scores of a file, that of ``--scores`` first.
        metrics: name -> function, of pyiqa.
    """

    files: dict[str, dict[str, dict]]
    metrics: dict[str, Callable[[Path, int | None], dict]]


def make_peers(args: argparse.Namespace) -> Peers:
    """Read ``--scores`` and ``--against``, make the metrics of ``--pyiqa``.

    Raises:
        CommandError: for two scorers of one name, and a ``--lower-better`` that names none.
    """
    told = [told.rpartition("=") for told in (*([args.scores] if args.scores else []), *args.against)]
    names = [name or Path(path).stem for name, _, path in told]
    baselines = [] if args.no_baselines else list(BASELINES)
    twice = [name for name, count in Counter([*names, *args.pyiqa, *baselines]).items() if count > 1]
    if twice:
        raise CommandError(f"two scorers are called {twice[0]!r}; give a file another name: --against NAME=FILE")
    unknown = sorted(set(args.lower_better) - set(names))
    if unknown:
        raise CommandError(
            f"--lower-better {unknown[0]}: no file of scores is called that; there is {', '.join(names) or 'none'}"
        )
    files = {name: read_scores(path) for name, (_, _, path) in zip(names, told, strict=True)}
    first = process_rank()[0] == 0  # the others only help with the model's scores
    return Peers(files, {name: pyiqa_metric(name, args.device) for name in args.pyiqa} if first else {})


def columns(
    args: argparse.Namespace,
    scorer: QualityScorer | None,
    peers: Peers,
    items: Sequence[RatedImage],
    name: str,
    short_edge: int | None = None,
) -> list[Column]:
    """The scorers of one data set, the one that the others are compared with first.

    Args:
        args: of ``vqr1 evaluate``.
        scorer: the model; None takes the first file of ``peers`` in its place.
        peers: of :func:`make_peers`.
        items: pictures with a path.
        name: of the data set, for the progress bar and messages.
        short_edge: the data set's resizing.
    """
    found = [_from_file(told, scores, args, items, name) for told, scores in peers.files.items()]
    if scorer is not None:
        identity = made_by(scorer, short_edge)
        called = model_name(identity)
        if called in {*peers.files, *peers.metrics}:
            raise CommandError(f"the model is called {called!r} too; give the file another name: --against NAME=FILE")
        with progress_bar(args, name, len({item.path for item in items})) as bar:
            rows = score_items(scorer, items, cache_folder(args), short_edge, bar.update)
        found.insert(0, Column(called, "model", rows, identity=identity))
    if process_rank()[0] > 0:
        return found  # the first process does the rest
    for metric_name, metric in peers.metrics.items():
        rows = with_bar(args, metric_name, items, lambda item, metric=metric: metric(item.path, short_edge))
        found.append(Column(metric_name, "pyiqa", rows))
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
    """A bar for one data set, which says what process it is of."""
    rank, processes = process_rank()
    label = name if processes == 1 else f"{name} (process {rank + 1} of {processes})"
    return progress(total, silent=args.silent, label=label)


def with_bar(args: argparse.Namespace, name: str, things: Iterable, function: Callable) -> list:
    """``[function(thing) for thing in things]`` with a bar."""
    things = list(things)
    with progress_bar(args, name, len(things)) as bar:
        found = []
        for thing in things:
            found.append(function(thing))
            bar.update()
    return found


def _from_file(
    name: str, scores: dict[str, dict], args: argparse.Namespace, items: Sequence[RatedImage], dataset: str
) -> Column:
    rows = match_scores(scores, items)
    if not any(rows):
        raise CommandError(f"{name}: holds a score for none of the {len(items)} pictures of {dataset}")
    return Column(name, "scores", rows, lower_is_better=name in args.lower_better)
