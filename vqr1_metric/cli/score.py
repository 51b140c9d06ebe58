"""``vqr1 score``: pictures in, one row for each out, resumable, in memory that does not grow with their number."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric import __version__, score_files
from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_image_options, add_model_options, build_scorer, image_finder
from vqr1_metric.images.find import Found, ImageFinder
from vqr1_metric.images.names import ImageKeys, printable

if TYPE_CHECKING:
    from vqr1_metric.results import ImageScore
    from vqr1_metric.scorer import QualityScorer

_LEVEL = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_image_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="scores as .csv, or as .jsonl with distributions"
    )
    parser.add_argument("--resume", action="store_true", help="continue the output file where a run stopped")
    parser.add_argument("--retry-errors", action="store_true", help="like --resume, and score again what has no score")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if any picture has no score")
    parser.add_argument("--json", action="store_true", help="summary as JSON; without -o with all rows")
    parser.add_argument("--silent", action="store_true", help="no progress bar, no summary")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Score, and return 0 if at least one picture has a score."""
    _check_output(args)
    finder = image_finder(args)
    scorer = build_scorer(args)
    meta = {**scorer.card(), "package": __version__, "started": datetime.now(UTC).isoformat("T", "seconds")}
    tally = Tally()
    writer = None
    with contextlib.ExitStack() as stack:
        if args.output is not None:
            writer = stack.enter_context(score_files.RecordWriter(args.output, overwrite=args.overwrite))
            if not writer.empty and not args.resume:  # it appeared since we looked
                raise CommandError(f"{args.output} exists: --resume continues it, --overwrite replaces it")
        resuming = writer is not None and not writer.empty
        done: set[int] = set()
        old = _read_output(args, writer, meta, done, tally) if resuming else meta
        before = tally.rows
        bar = stack.enter_context(_progress_bar(args, finder))
        pending = _pending(finder, done, bar)
        first = next(pending, None)
        if first is None:  # nothing left to do: the model need not be loaded to say so
            meta = old
        else:
            if resuming:
                writer.folder = score_files.base_folder(args.output, old)
            elif writer is not None:
                _ = scorer.backend  # a model that cannot be loaded leaves no file behind
                score_files.write_meta(args.output, meta | {"folder": score_files.folder_from(args.output)})
            _score(scorer, itertools.chain([first], pending), args, tally, bar, writer)
    _report(args, meta, tally, tally.rows - before if resuming else None, finder)
    if not tally.scored:
        raise CommandError("nothing was scored: no picture could be read or judged")
    if args.strict and tally.rows > tally.scored:
        raise CommandError(f"{tally.rows - tally.scored} pictures have no score (--strict)")
    return 0


def _score(
    scorer: QualityScorer,
    images: Iterator[Found],
    args: argparse.Namespace,
    tally: Tally,
    bar,
    writer: score_files.RecordWriter | None,
) -> None:
    def take(result: ImageScore) -> None:
        sink.write(result)
        tally.add(result.score)
        bar.update()

    def names() -> Iterator[str]:
        for found in images:
            if found.problem is None:
                yield found.name
            else:
                take(ImageScore.failed(found.name, f"{found.name}: {found.problem}"))

    from vqr1_metric.results import ImageScore

    try:
        with writer or (_JsonRows() if args.json else _Table(bar)) as sink:
            for result in scorer.stream(names(), in_order=writer is None):
                take(result)
    except KeyboardInterrupt:
        kept = f": {tally.rows} rows are in {args.output}, --resume continues there" if writer else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None


def _report(args: argparse.Namespace, meta: dict[str, Any], tally: Tally, new: int | None, finder: ImageFinder) -> None:
    summary = tally.summary() | {key: meta[key] for key in ("model", "revision", "package")}
    summary |= {"mode": meta["identity"]["mode"], "prompt": meta["identity"]["question"]}
    summary["output"] = None if args.output is None else str(args.output)
    counts = finder.counts
    summary["found"] = {**asdict(counts), "skipped": dict(counts.skipped)}
    if args.json:
        print(json.dumps(summary) + ("" if args.output else "}"))
    elif not args.silent:
        print(_as_text(summary, new))
        if counts.summary():
            print(counts.summary())


class Tally:
    """Counts, and 8 bytes for each score: all that a run remembers of its pictures, beside a hash of their names."""

    def __init__(self) -> None:
        self.rows = 0
        self.scores = array("d")

    @property
    def scored(self) -> int:
        """Rows that have a score."""
        return len(self.scores)

    def add(self, score: float) -> None:
        """Count a row; NaN is one without a score."""
        self.rows += 1
        if not math.isnan(score):
            self.scores.append(score)

    def summary(self) -> dict[str, Any]:
        """The mean of the scores there are, with its 95% interval (bootstrap over pictures); None without scores."""
        import torch

        from vqr1_metric.functional.bootstrap import bootstrap_mean_interval

        mean, interval = None, None
        if self.scored:
            scores = torch.frombuffer(self.scores, dtype=torch.float64)
            mean = float(scores.mean())
            if self.scored > 1:
                interval = [float(bound) for bound in bootstrap_mean_interval(scores, _LEVEL)]
        return {
            "pictures": self.rows,
            "scored": self.scored,
            "failed": self.rows - self.scored,
            "mean": mean,
            "interval": interval,
            "level": _LEVEL,
        }


class _Table:
    """Rows on stdout, aligned; what varies in length comes last."""

    def __init__(self, bar) -> None:
        self._bar = bar

    def __enter__(self) -> _Table:
        self._print(f"score  {'std':>5}  {'95% range':>10}  coverage  picture")
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def write(self, result: ImageScore) -> None:
        row, name = score_files.as_row(result), printable(result.name)
        if row["error"]:
            self._print(f"  nan  {'-':>5}  {'-':>10}  {'-':>8}  {name}: {printable(row['error'])}")
            return
        numbers = f"{row['score']:5.2f}  {row['std']:5.2f}  {row['low']:.2f}..{row['high']:.2f}  {row['coverage']:8.1%}"
        self._print(f"{numbers}  {name}")

    def _print(self, line: str) -> None:
        if sys.stderr.isatty():  # the bar shares the terminal with the table and must step aside
            self._bar.write(line, file=sys.stdout)
        else:
            print(line)


class _JsonRows:
    """Rows on stdout as one JSON object, which the summary completes."""

    def __init__(self) -> None:
        self._separator = ""

    def __enter__(self) -> _JsonRows:
        print('{"rows": [', end="")
        return self

    def __exit__(self, *exc: object) -> None:
        print('\n], "summary": ', end="")

    def write(self, result: ImageScore) -> None:
        print(f"{self._separator}\n{json.dumps(score_files.as_json(result, details=False))}", end="")
        self._separator = ","


def _check_output(args: argparse.Namespace) -> None:
    """Raises where an output cannot be written, before anything is loaded."""
    output = args.output
    if output is None:
        if args.resume or args.overwrite or args.retry_errors:
            raise UsageError("--resume, --retry-errors and --overwrite are about an output file: name it with -o")
        return
    try:
        score_files.file_format(output)
    except score_files.RecordError as error:
        raise UsageError(str(error)) from None
    args.resume = args.resume or args.retry_errors
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if not output.parent.is_dir():
        raise CommandError(f"no folder {str(output.parent)!r} to write {output.name!r} into")
    if output.exists() and output.stat().st_size and not (args.resume or args.overwrite):
        raise CommandError(f"{output} exists: --resume continues it, --overwrite replaces it")


def _read_output(
    args: argparse.Namespace, writer: score_files.RecordWriter, meta: dict[str, Any], done: set[int], tally: Tally
) -> dict[str, Any]:
    """Take in what an earlier run wrote, and return its meta data."""
    output = args.output
    old = score_files.read_meta(output)
    score_files.check_same(output, old, meta)
    score_files.repair(output)
    if args.retry_errors:
        writer.drop_errors()
    keys = ImageKeys(score_files.base_folder(output, old))
    for name, score in score_files.read_rows(output):
        done.add(keys.key(name))
        tally.add(score)
    return old


def _pending(finder: ImageFinder, done: set[int], bar) -> Iterator[Found]:
    """The pictures that have no row yet."""
    keys = ImageKeys()
    for found in finder:
        if keys.key(found.name) in done:
            bar.update()
        else:
            yield found


def _progress_bar(args: argparse.Namespace, finder: ImageFinder):
    from tqdm import tqdm

    if args.silent:
        return tqdm(disable=True)
    total = None if finder.reads_input else sum(1 for _ in image_finder(args, note=False))
    # In a log file every refresh is a line of its own.
    return tqdm(total=total, unit="picture", file=sys.stderr, mininterval=0.2 if sys.stderr.isatty() else 10.0)


def _as_text(summary: dict[str, Any], new: int | None) -> str:
    lines = []
    if summary["scored"]:
        interval = summary["interval"]
        shown = f", {summary['level']:.0%} interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        lines.append(f"mean {summary['mean']:.3f}{shown}, pictures with a score: {summary['scored']}")
    if summary["failed"]:
        where = "the column error says why" if summary["output"] else "the reasons are above"
        lines.append(f"without a score: {summary['failed']} ({where})")
    lines.append(f"model {summary['model']} ({summary['revision']}), mode {summary['mode']}")
    if summary["output"]:
        added = "" if new is None else f", {new} of them new"
        lines.append(f"rows in {summary['output']}: {summary['pictures']}{added}")
    return "\n".join(lines)
