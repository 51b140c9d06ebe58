"""``vqr1 evaluate``: agreement of a model, and of others, with people: tables, JSON and a page."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_model_options, build_scorer, positive

if TYPE_CHECKING:
    from vqr1_metric.evaluation.labels import LabelSet
    from vqr1_metric.evaluation.run import Column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    what = parser.add_argument_group("what to evaluate on (one of these)")
    what.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="CSV with a header (image, mos and optionally std, scene, method, split), the authors' label files, XLSX",
    )  # fmt: skip
    what.add_argument("--dataset", metavar="NAME", help="a data set of --list, in the layout of its owners")
    what.add_argument("--suite", metavar="NAME", help="paper: every data set of it that is there")
    what.add_argument("--list", action="store_true", help="list the data sets, and where to get them")
    what.add_argument("--images", type=Path, metavar="DIR", help="the pictures of --labels (default: beside the file)")
    what.add_argument("--root", type=Path, metavar="DIR", help="the folder of --dataset, or that of all data sets")
    what.add_argument("--split", metavar="NAME", help="train, val, test or all (default: the official test split)")
    what.add_argument("--lower-is-better", action="store_true", help="the labels are DMOS: lower means better")
    who = parser.add_argument_group("what to evaluate")
    who.add_argument("--scores", metavar="[NAME=]FILE", help="scores that were made before, instead of a model's")
    who.add_argument(
        "--against", action="append", default=[], metavar="[NAME=]FILE", help="other scores of the same pictures"
    )
    who.add_argument("--pyiqa", action="append", default=[], metavar="METRIC", help="any metric of pyiqa by name")
    who.add_argument(
        "--lower-better", action="append", default=[], metavar="NAME", help="lower means better for these scores"
    )
    who.add_argument("--no-baselines", action="store_true", help="leave out the parameter-free scorers")
    how = parser.add_argument_group("output")
    how.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of the results")
    how.add_argument("--cache", type=Path, metavar="DIR", help="folder of the scores' cache (default: DIR/cache)")
    how.add_argument("--level", type=float, default=0.95, help="probability of the intervals (default: 0.95)")
    how.add_argument("--resamples", type=positive, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    how.add_argument("--bootstrap-seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    how.add_argument("--silent", action="store_true", help="no progress bar, no table on the terminal")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the results, print the tables."""
    if args.list:
        print(_listing())
        return 0
    _check(args)
    from vqr1_metric.evaluation.run import Settings, evaluate, provenance
    from vqr1_metric.evaluation.scoring import process_rank
    from vqr1_metric.evaluation.tables import write_scores_csv

    sets = _label_sets(args)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.level, args.resamples, args.bootstrap_seed)
    columns = [_columns(args, labels) for labels in sets]
    if process_rank()[0] > 0:
        return 0  # its share of the pictures is scored; the first process writes
    found = []
    for labels, scorers in zip(sets, columns, strict=True):
        found.append(evaluate(labels, scorers, settings))
        write_scores_csv(args.output / f"{_file_name(labels.name)}.scores.csv", labels, scorers)
    identity = next((column.identity for scorers in columns for column in scorers if column.identity), None)
    made_with = provenance(_command(), settings, {"model": identity})
    _write(args, found, made_with, list(zip(sets, columns, strict=True)))
    return 0


def _write(args: argparse.Namespace, found: list[dict[str, Any]], made_with: dict[str, Any], data: list[tuple]) -> None:
    from vqr1_metric.evaluation.tables import markdown, write_json, write_table_csv

    text = markdown(found, made_with)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    write_table_csv(args.output / "table.csv", found)
    write_json(args.output / "results.json", {"made_with": made_with, "sets": found})
    if not args.silent:
        print(text)
        print(f"results in {args.output}")


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if sum(bool(what) for what in (args.labels, args.dataset, args.suite)) != 1:
        raise CommandError("evaluate on what? Give one of --labels FILE, --dataset NAME, --suite NAME (or --list)")
    if args.output is None:
        raise CommandError("where do the results go? Give a folder with -o")
    if (args.dataset or args.suite) and args.root is None:
        raise CommandError("where are the data sets? Give their folder with --root")
    if not 0 < args.level < 1:
        raise CommandError(f"expected --level between 0 and 1, but got {args.level:g}")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise CommandError("vqr1 evaluate needs SciPy: pip install 'vqr1-metric[evaluate]'") from None


def _label_sets(args: argparse.Namespace) -> list[LabelSet]:
    from vqr1_metric.evaluation.datasets import find_folder, get_dataset, suite
    from vqr1_metric.evaluation.labels import attach
    from vqr1_metric.evaluation.readers import read_labels

    if args.labels:
        labels = read_labels(args.labels, lower_is_better=True if args.lower_is_better else None)
        complete = len(labels)
        labels = labels.take_split(args.split or "all")
        return [attach(labels, args.images or args.labels.parent, report_unlabelled=len(labels) == complete)]
    if not args.root.is_dir():
        raise CommandError(f"no folder {str(args.root)!r}")
    if args.dataset:
        dataset = get_dataset(args.dataset)
        return [dataset.load(find_folder(dataset, args.root) or args.root, args.split)]
    sets = []
    for dataset in suite(args.suite):
        folder = find_folder(dataset, args.root)
        if folder is None:
            _say(f"not there, left out: {dataset.how_to_get()}")
        else:
            sets.append(dataset.load(folder, args.split))
    if not sets:
        raise CommandError(f"none of the data sets is in {str(args.root)!r}; vqr1 evaluate --list says what is known")
    return sets


def _columns(args: argparse.Namespace, labels: LabelSet) -> list[Column]:
    """The scorers of one data set, the one that the others are compared with first."""
    from vqr1_metric.evaluation.baselines import BASELINES, baseline_scores
    from vqr1_metric.evaluation.peers import pyiqa_metric
    from vqr1_metric.evaluation.run import Column
    from vqr1_metric.evaluation.scoring import process_rank

    columns = [_from_file(args.scores, args, labels) if args.scores else _from_model(args, labels)]
    if process_rank()[0] > 0:
        return columns
    columns += [_from_file(told, args, labels) for told in args.against]
    for name in args.pyiqa:
        metric = pyiqa_metric(name, args.device)
        scores = _with_bar(args, name, labels, lambda item, m=metric: m(item.path, labels.short_edge))
        columns.append(Column(name, "pyiqa", [{"score": score} for score in scores]))
    if not args.no_baselines:
        rows = _with_bar(args, "baselines", labels, lambda item: baseline_scores(item.path, labels.short_edge))
        columns += [Column(name, "baseline", [{"score": row[name]} for row in rows]) for name in BASELINES]
    return columns


def _from_model(args: argparse.Namespace, labels: LabelSet) -> Column:
    from vqr1_metric.evaluation.run import Column
    from vqr1_metric.evaluation.scoring import score_items, scorer_identity

    scorer = build_scorer(args)
    with _bar(args, f"{labels.name}", len({item.path for item in labels.items})) as bar:
        rows = score_items(scorer, labels.items, args.cache or args.output / "cache", labels.short_edge, bar.update)
    identity = scorer_identity(scorer, labels.short_edge)
    return Column(_model_name(identity), "model", rows, identity=identity)


def _model_name(identity: dict[str, Any]) -> str:
    name = Path(identity["model"]).name
    return name if identity["mode"] == "score" else f"{name} ({identity['mode']})"


def _from_file(told: str, args: argparse.Namespace, labels: LabelSet) -> Column:
    from vqr1_metric.evaluation.peers import match_scores, read_scores
    from vqr1_metric.evaluation.run import Column

    name, _, path = told.rpartition("=")
    path = Path(path)
    name = name or path.stem
    rows = match_scores(read_scores(path), labels.items)
    if not any(rows):
        raise CommandError(f"{path}: holds a score for none of the {len(labels)} pictures of {labels.name}")
    return Column(name, "scores", rows, lower_is_better=name in args.lower_better)


def _with_bar(args: argparse.Namespace, name: str, labels: LabelSet, score: Callable) -> list:
    with _bar(args, name, len(labels)) as bar:
        found = []
        for item in labels.items:
            found.append(score(item))
            bar.update()
    return found


def _bar(args: argparse.Namespace, name: str, total: int):
    from tqdm import tqdm

    from vqr1_metric.evaluation.scoring import process_rank

    rank, processes = process_rank()
    label = name if processes == 1 else f"{name} (process {rank + 1} of {processes})"
    interval = 0.2 if sys.stderr.isatty() else 10.0  # in a log file every refresh is a line of its own
    return tqdm(
        total=total, desc=label, unit="picture", file=sys.stderr, mininterval=interval, disable=args.silent, leave=False
    )


def _listing() -> str:
    from vqr1_metric.evaluation.datasets import DATASETS

    lines = []
    for dataset in DATASETS.values():
        count = "count not stated" if dataset.count is None else f"{dataset.count} pictures"
        split = "" if dataset.split == "all" else f", evaluated on its {dataset.split} split"
        edge = "" if dataset.short_edge is None else f", reduced to a short edge of {dataset.short_edge}"
        lines += [
            f"{dataset.name:<10} {dataset.title}: {count}{split}{edge}",
            f"           where:   {dataset.where}", f"           licence: {dataset.licence}",
            f"           layout:  {dataset.folders[0]}/ with {dataset.layout}",
        ]  # fmt: skip
    return "\n".join(lines)


def _command() -> str:
    return "vqr1 " + shlex.join(sys.argv[1:]) if sys.argv[1:] else "vqr1 evaluate"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _say(message: str) -> None:
    print(f"vqr1: {message}", file=sys.stderr)
