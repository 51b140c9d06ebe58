"""``vqr1 score``: images in, one row for each out, resumable, in memory that does not grow with their number."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqr1_metric import __version__, score_files
from vqr1_metric.cli import CommandError, UsageError
from vqr1_metric.cli.options import add_image_options, add_model_options, build_scorer, image_finder, positive, shard
from vqr1_metric.images.find import Found, ImageFinder
from vqr1_metric.images.names import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from vqr1_metric.results import ImageScore
    from vqr1_metric.score_runs import StreamScorer, Tally


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_image_options(parser)
    group = parser.add_argument_group("parts")
    group.add_argument(
        "--tiles",
        type=positive,
        metavar="N",
        help="score tiles of at most NxN pixels: their mixture, and the worst one",
    )
    group.add_argument(
        "--every", type=positive, metavar="N", help="score videos by every N-th frame: their mixture, and the worst one"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="scores as .csv, or as .jsonl with distributions"
    )
    group.add_argument("--resume", action="store_true", help="continue the output file where a run stopped")
    group.add_argument("--retry-errors", action="store_true", help="like --resume, and score again what has no score")
    group.add_argument("--overwrite", action="store_true", help="replace the output file")
    group.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="only the I-th of N parts, into FILE.I-of-N; one process for each GPU or machine, then vqr1 merge",
    )
    group.add_argument("--strict", action="store_true", help="exit code 1 if any image has no score")
    group.add_argument("--json", action="store_true", help="summary as JSON; without -o with all rows")
    group.add_argument("--silent", action="store_true", help="no progress bar, no warnings, no summary")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Score, and return 0 if at least one image has a score."""
    _check_usage(args)
    finder = image_finder(args)
    to_file = args.output is not None
    if to_file:
        from vqr1_metric.score_runs import check_output, shard_path

        output = args.output if args.shard is None else shard_path(args.output, *args.shard)
        check_output(output, resume=args.resume or args.retry_errors, overwrite=args.overwrite)
    meta, tally, new, output = (_into_file if to_file else _onto_stdout)(args, finder)
    _report(args, meta, tally, new, finder, output)
    if not tally.scored and not (args.shard and not tally.rows):
        raise CommandError("nothing was scored: no picture could be read or judged")
    if args.strict and tally.rows > tally.scored:
        raise CommandError(f"{tally.rows - tally.scored} pictures have no score (--strict)")
    return 0


def _into_file(args: argparse.Namespace, finder: ImageFinder) -> tuple[dict[str, Any], Tally, int | None, Path | None]:
    from vqr1_metric.score_runs import ScoreRun, in_shard

    part = args.shard
    mine = None if part is None else lambda found: in_shard(found.name, *part)
    options = {"resume": args.resume, "retry_errors": args.retry_errors, "overwrite": args.overwrite, "shard": part}
    with ScoreRun(_scorer(args), args.output, **options) as scoring, _progress_bar(args, finder, mine) as bar:
        try:
            for _ in scoring.rows(finder, bar.update):
                bar.update()
        except KeyboardInterrupt:
            kept = f"{scoring.tally.rows} rows are in {scoring.output}"
            raise KeyboardInterrupt(f"interrupted: {kept}, --resume continues there") from None
    new = None if scoring.resumed is None else scoring.tally.rows - scoring.resumed
    return scoring.meta, scoring.tally, new, scoring.output


def _onto_stdout(args: argparse.Namespace, finder: ImageFinder) -> tuple[dict[str, Any], Tally, None, None]:
    from vqr1_metric.score_runs import Tally, stream_found

    scorer, tally = _scorer(args), Tally()
    meta = {**scorer.card(), "package": __version__, "started": datetime.now(UTC).isoformat("T", "seconds")}
    try:
        with _progress_bar(args, finder) as bar, _JsonRows() if args.json else _Table(bar) as sink:
            for result in stream_found(scorer, finder):
                sink.write(result)
                tally.add(result.score)
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted") from None
    return meta, tally, None, None


def _scorer(args: argparse.Namespace) -> StreamScorer:
    scorer = build_scorer(args)
    if args.tiles or args.every:
        from vqr1_metric.parts import TiledScorer, VideoScorer

        return TiledScorer(scorer, args.tiles) if args.tiles else VideoScorer(scorer, args.every)
    return scorer


def _check_usage(args: argparse.Namespace) -> None:
    if args.tiles and args.every:
        raise UsageError("--tiles and --every exclude each other")
    about_output = ("resume", "retry_errors", "overwrite", "shard")
    told = [name for name in about_output if getattr(args, name)]
    if args.output is None:
        if told:
            raise UsageError(f"--{told[0].replace('_', '-')} is about an output file: name it with -o")
        return
    try:
        score_files.file_format(args.output)
    except score_files.RecordError as error:
        raise UsageError(str(error)) from None
    if args.overwrite and (args.resume or args.retry_errors):
        raise UsageError("--resume and --overwrite exclude each other")


def _progress_bar(
    args: argparse.Namespace, finder: ImageFinder, mine: Callable[[Found], bool] | None = None
) -> tqdm[Any]:
    from tqdm import tqdm

    if args.silent:
        return tqdm(disable=True)
    total = (
        None if finder.reads_input else sum(1 for found in image_finder(args, note=False) if not mine or mine(found))
    )
    # In a log file every refresh is a line of its own.
    return tqdm(total=total, unit="image", file=sys.stderr, mininterval=0.2 if sys.stderr.isatty() else 10.0)


def _report(
    args: argparse.Namespace,
    meta: dict[str, Any],
    tally: Tally,
    new: int | None,
    finder: ImageFinder,
    output: Path | None,
) -> None:
    counts = tally.summary()
    summary = {
        "pictures": counts.pop("images"),
        **counts,
        **{key: meta[key] for key in ("model", "revision", "package")},
    }
    summary |= {"mode": meta["identity"]["mode"], "prompt": meta["identity"]["question"]}
    summary["output"] = None if output is None else str(output)
    summary["found"] = {**asdict(finder.counts), "skipped": dict(finder.counts.skipped)}
    if args.json:
        print(json.dumps(summary) + ("" if output else "}"))
    elif not args.silent:
        print(_as_text(summary, new))
        if finder.counts.summary():
            print(printable(finder.counts.summary()))


class _Table:
    """Rows on stdout, aligned; what varies in length comes last."""

    def __init__(self, bar: tqdm[Any]) -> None:
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
        self._print(f"{numbers}  {name}{_worst(row)}")

    def _print(self, line: str) -> None:
        if sys.stderr.isatty():  # the bar shares the terminal with the table and must step aside
            self._bar.write(line, file=sys.stdout)
        else:
            print(line)


def _worst(row: dict[str, Any]) -> str:
    """Of an image in tiles, or of a video: the worst part and its place."""
    if "worst_time" in row:
        at = f"{row['worst_time']:.3f} s" if row["worst_time"] is not None else f"frame {row['worst_frame']}"
    elif "worst_x" in row:
        at = f"{row['worst_width']}x{row['worst_height']} pixels at {row['worst_x']},{row['worst_y']}"
    else:
        return ""
    return f" (worst of {row['parts']}: {row['worst_score']:.2f}, {at})"


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
