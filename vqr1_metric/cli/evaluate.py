"""``vqr1 evaluate``: agreement of a model, and of others, with people: tables, JSON and a page."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_bootstrap_options, add_model_options, build_scorer, positive

if TYPE_CHECKING:
    from vqr1_metric.evaluation.run import Settings
    from vqr1_metric.ratings import RatingSet
    from vqr1_metric.scorer import QualityScorer

_WHAT = ("labels", "dataset", "suite", "preferences", "ladder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    what = parser.add_argument_group("what to evaluate on (one of the first five)")
    what.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="CSV with a header (image, mos and optionally std, scene, method, split), the authors' label files, XLSX",
    )
    what.add_argument("--dataset", metavar="NAME", help="a data set of --list, in the layout of its owners")
    what.add_argument("--suite", metavar="NAME", help="paper: every data set of it that is there")
    what.add_argument(
        "--preferences",
        type=Path,
        metavar="FILE",
        help="votes: CSV with a, b, votes_a, votes_b, or image, scene, best_votes",
    )
    what.add_argument("--ladder", type=Path, metavar="DIR", help="undistorted pictures: distort them, step by step")
    what.add_argument("--list", action="store_true", help="list the data sets, and where to get them")
    what.add_argument("--images", type=Path, metavar="DIR", help="the pictures of a file (default: beside the file)")
    what.add_argument("--root", type=Path, metavar="DIR", help="the folder of --dataset, or that of all data sets")
    what.add_argument("--split", metavar="NAME", help="train, val, test or all (default: the official test split)")
    what.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=HEADER",
        help="a column of the labels that is called otherwise: mos=MOS_z, image=file, std, scene, method, split, ...",
    )
    direction = what.add_mutually_exclusive_group()
    direction.add_argument("--lower-is-better", action="store_true", help="lower labels mean better, as of most DMOS")
    direction.add_argument("--higher-is-better", action="store_true", help="higher labels do, though called dmos")
    what.add_argument("--distortion", action="append", metavar="NAME", help="of --ladder (default: all)")
    what.add_argument("--max-edge", type=positive, metavar="N", help="reduce the pictures of --ladder first")
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
    add_bootstrap_options(how)
    how.add_argument("--bootstrap-seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")
    how.add_argument("--no-page", action="store_true", help="write no index.html and no plots")
    how.add_argument("--silent", action="store_true", help="no progress bar, no table on the terminal")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the results, print the tables."""
    if args.list:
        print(_listing())
        return 0
    _check(args)
    from vqr1_metric.cli.evaluate_special import run_ladder, run_preferences
    from vqr1_metric.evaluation.run import Settings

    settings = Settings(args.level, args.resamples, args.bootstrap_seed)
    if args.preferences:
        return run_preferences(args, _scorer(args), settings, command())
    if args.ladder:
        return run_ladder(args, _scorer(args), settings, command())
    return _run_labels(args, settings)


def _run_labels(args: argparse.Namespace, settings: Settings) -> int:
    from vqr1_metric.cli.scorers import columns, make_peers
    from vqr1_metric.evaluation.run import evaluate, provenance
    from vqr1_metric.evaluation.scoring import process_rank
    from vqr1_metric.evaluation.tables import markdown, write_json, write_scores_csv, write_table_csv, write_text

    sets = _label_sets(args)
    peers = make_peers(args)
    args.output.mkdir(parents=True, exist_ok=True)
    scorer = _scorer(args)
    scored = [columns(args, scorer, peers, labels.images, labels.name, labels.short_edge) for labels in sets]
    if process_rank()[0] > 0:
        return 0  # its share of the pictures is scored; the first process writes
    found: list[dict[str, Any]] = []
    for labels, scorers in zip(sets, scored, strict=True):
        found.append(evaluate(labels, scorers, settings))
        write_scores_csv(args.output / f"{file_name(labels.name)}.scores.csv", labels, scorers)
    identity = next((column.identity for scorers in scored for column in scorers if column.identity), None)
    made_with = provenance(command(), settings, {"model": identity})
    text = markdown(found, made_with)
    write_text(args.output / "table.md", text)
    write_table_csv(args.output / "table.csv", found, made_with)
    write_json(args.output / "results.json", {"made_with": made_with, "sets": found})
    if not args.no_page:
        from vqr1_metric.evaluation.page import evaluation_page, scatter

        for entry, labels, scorers in zip(found, sets, scored, strict=True):
            for row, column in zip(entry["scorers"], scorers, strict=True):
                plot = scatter(row, column, labels)
                if plot is not None:
                    name = f"{file_name(labels.name)}.{file_name(column.name)}.svg"
                    write_text(args.output / name, plot.standalone())
        data = list(zip(sets, scored, strict=True))
        page = evaluation_page(found, data, made_with, args.output / "cache" / "thumbnails")
        write_text(args.output / "index.html", page)
    if not args.silent:
        print(text)
        print(f"results in {args.output}")
    return 0


def command() -> str:
    """The command line, for the record."""
    return "vqr1 " + shlex.join(sys.argv[1:])


def file_name(name: str) -> str:
    """A data set's name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _scorer(args: argparse.Namespace) -> QualityScorer | None:
    if args.scores:
        return None
    if args.device is None and args.device_map is None:
        from vqr1_metric.evaluation.scoring import local_device

        args.device = local_device()
    return build_scorer(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if sum(bool(getattr(args, name)) for name in _WHAT) != 1:
        raise CommandError(f"evaluate on what? Give one of {', '.join(f'--{name}' for name in _WHAT)} (or --list)")
    if args.output is None:
        raise CommandError("where do the results go? Give a folder with -o")
    if args.output.exists() and not args.output.is_dir():
        raise CommandError(f"-o names a folder, but {str(args.output)!r} is a file")
    if (args.dataset or args.suite) and args.root is None:
        raise CommandError("where are the data sets? Give their folder with --root")
    if args.scores and (args.model or args.server):
        raise CommandError("--scores takes the model's place: give one of them, or the file with --against")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise CommandError("vqr1 evaluate needs SciPy: pip install 'vqr1-metric[evaluate]'") from None


def _label_sets(args: argparse.Namespace) -> list[RatingSet]:
    from vqr1_metric.ratings.datasets import find_folder, get_dataset, suite

    if args.labels:
        labels = read_label_file(args.labels, args)
        if labels.preferences:
            raise CommandError(f"{args.labels}: holds votes, not scores of pictures: give it with --preferences")
        _ = labels.quality  # the direction of a dmos column must be told
        return [_not_empty(part, args.images or args.labels.parent) for part in labels.by_dataset()]
    if not args.root.is_dir():
        obtain = f". {get_dataset(args.dataset).how_to_get()}" if args.dataset else ""
        raise CommandError(f"no folder {str(args.root)!r}{obtain}")
    if args.dataset:
        dataset = get_dataset(args.dataset)
        folder = find_folder(dataset, args.root) or args.root
        return [_not_empty(dataset.load(folder, args.split), folder)]
    sets = []
    for dataset in suite(args.suite):
        folder = find_folder(dataset, args.root)
        if folder is None:
            print(f"vqr1: not there, left out: {dataset.how_to_get()}", file=sys.stderr)
        else:
            sets.append(_not_empty(dataset.load(folder, args.split), folder))
    if not sets:
        raise CommandError(f"none of the data sets is in {str(args.root)!r}; vqr1 evaluate --list says what is known")
    return sets


def read_label_file(path: Path, args: argparse.Namespace) -> RatingSet:
    """A label file as the options say."""
    from vqr1_metric.ratings import read_ratings

    lower = True if args.lower_is_better else False if args.higher_is_better else None
    columns = {role: header or None for role, _, header in (told.partition("=") for told in args.column)}
    return read_ratings(
        path, args.images, strict=False, columns=columns, lower_is_better=lower, split=args.split or "all"
    )


def _not_empty(labels: RatingSet, folder: Path) -> RatingSet:
    if not labels.images:
        names = ", ".join(problem.subject for problem in labels.problems[:3])
        raise CommandError(f"none of the pictures of {labels.name} is in {str(folder)!r} ({names}, ...)")
    return labels


def _listing() -> str:
    from vqr1_metric.ratings.datasets import DATASETS

    lines = []
    for dataset in DATASETS.values():
        count = "count not verified" if dataset.count is None else f"{dataset.count} pictures"
        split = "" if dataset.split == "all" else f", evaluated on its {dataset.split} split"
        edge = "" if dataset.short_edge is None else f", reduced to a short edge of {dataset.short_edge}"
        lines += [
            f"{dataset.name:<10} {dataset.title}: {count}{split}{edge}",
            f"           where:   {dataset.where}",
            f"           licence: {dataset.licence}",
            f"           layout:  {dataset.folders[0]}/ with {dataset.layout}",
        ]
    return "\n".join(lines)
