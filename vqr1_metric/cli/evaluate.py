"""``vqr1 evaluate``: agreement of a model, and of others, with people: tables, JSON and a page."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_bootstrap_options, add_model_options, build_scorer, positive, progress

if TYPE_CHECKING:
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
    what.add_argument(
        "--group", metavar="COLUMN", help="pictures with one cell in this column of the labels are not independent"
    )
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
    from vqr1_metric.evaluation import evaluate, evaluate_ladder

    common = {
        "baselines": not args.no_baselines,
        "level": args.level,
        "seed": args.bootstrap_seed,
        "cache": args.cache or args.output / "cache",
        "progress": lambda label, total: progress(total, silent=args.silent, label=label),
        "command": "vqr1 " + shlex.join(sys.argv[1:]),
    }
    if args.ladder:
        report = evaluate_ladder(_scorer(args), args.ladder, args.distortion, max_edge=args.max_edge, **common)
    else:
        sets = _sets(args)
        args.output.mkdir(parents=True, exist_ok=True)
        report = evaluate(
            {_name(args.scores): _path(args.scores)} if args.scores else _scorer(args),
            sets,
            {_name(told): _path(told) for told in _different(args.against)},
            group=args.group,
            pyiqa=args.pyiqa,
            lower_is_better=args.lower_better,
            resamples=args.resamples,
            device=args.device,
            **common,
        )
    report.save(args.output, page=not args.no_page)
    if report.made_with and not args.silent:  # of several processes only the first has results
        print(report.markdown())
        print(f"results in {args.output}")
    return 0


def _name(told: str) -> str:
    name, _, path = told.rpartition("=")
    return name or Path(path).stem


def _path(told: str) -> str:
    return told.rpartition("=")[2]


def _different(against: list[str]) -> list[str]:
    names = [_name(told) for told in against]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"two scorers are called {twice[0]!r}; give a file another name: --against NAME=FILE")
    return against


def _scorer(args: argparse.Namespace) -> QualityScorer:
    if args.device is None and args.device_map is None:
        from vqr1_metric.evaluation.scoring import local_device

        args.device = local_device()
    return build_scorer(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if sum(bool(getattr(args, name)) for name in _WHAT) != 1:
        raise UsageError(f"evaluate on what? Give one of {', '.join(f'--{name}' for name in _WHAT)} (or --list)")
    if args.output is None:
        raise UsageError("where do the results go? Give a folder with -o")
    if args.output.exists() and not args.output.is_dir():
        raise CommandError(f"-o names a folder, but {str(args.output)!r} is a file")
    if (args.dataset or args.suite) and args.root is None:
        raise UsageError("where are the data sets? Give their folder with --root")
    if args.scores and (args.model or args.server):
        raise UsageError("--scores takes the model's place: give one of them, or the file with --against")
    if args.ladder and args.scores:
        raise UsageError("--ladder distorts the pictures itself: it needs a --model, not --scores")
    if args.ladder and (args.against or args.pyiqa):
        raise UsageError("--ladder compares the model with the baselines only: leave out --against and --pyiqa")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise CommandError("vqr1 evaluate needs SciPy: pip install 'vqr1-metric[evaluate]'") from None


def _sets(args: argparse.Namespace) -> list[RatingSet]:
    from vqr1_metric.ratings.datasets import load_dataset, load_suite

    if args.labels or args.preferences:
        return [_label_file(args.labels or args.preferences, args)]
    if args.dataset:
        return [load_dataset(args.dataset, args.root, args.split)]
    return load_suite(
        args.suite,
        args.root,
        args.split,
        missing=lambda how: print(f"vqr1: not there, left out: {how}", file=sys.stderr),
    )


def _label_file(path: Path, args: argparse.Namespace) -> RatingSet:
    from vqr1_metric.ratings import read_ratings

    lower = True if args.lower_is_better else False if args.higher_is_better else None
    columns = {role: header or None for role, _, header in (told.partition("=") for told in args.column)}
    found = read_ratings(
        path, args.images, strict=False, columns=columns, lower_is_better=lower, split=args.split or "all"
    )
    if args.labels and found.preferences:
        raise CommandError(f"{path}: holds votes, not scores of pictures: give it with --preferences")
    if args.preferences and not found.preferences:
        raise CommandError(f"{path}: holds scores of pictures, not votes: give it with --labels")
    return found


def _listing() -> str:
    from vqr1_metric.ratings.datasets import DATASETS

    return "\n".join(dataset.describe() for dataset in DATASETS.values())
