"""``vqr1 report``: a page of scored pictures that opens offline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vqr1_metric import score_files
from vqr1_metric.cli import CommandError
from vqr1_metric.cli.diff import check_output
from vqr1_metric.cli.options import positive, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "scores",
        type=Path,
        metavar="SCORES",
        help="what vqr1 score wrote: .csv, or .jsonl with distributions and reasoning",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, .html")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="names in the file are relative to DIR (default: to here, or the file)",
    )
    parser.add_argument("--title", help="heading (default: the file's name)")
    parser.add_argument(
        "--thumbnail", type=positive, default=160, metavar="N", help="longer edge of the small pictures (default: 160)"
    )
    parser.add_argument("--silent", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    check_output(args, ".html", ".htm")
    from vqr1_metric.evaluation.page import report_page
    from vqr1_metric.evaluation.peers import read_scores
    from vqr1_metric.evaluation.tables import write_text

    found = read_scores(args.scores)
    if not found:
        raise CommandError(f"{args.scores}: holds no scores")
    rows = [{**row, "path": name, "file": _picture(name, args)} for name, row in found.items()]
    cache = args.output.with_name(args.output.stem + ".thumbnails")
    with progress(len(rows), silent=args.silent) as bar:
        title = args.title or args.scores.stem
        text = report_page(
            rows, title, _made_with(args.scores), args.output, cache, size=args.thumbnail, progress=bar.update
        )
    part = args.output.with_name(args.output.name + ".part")
    write_text(part, text)  # a full disk leaves no half page
    part.replace(args.output)
    if not args.silent:
        size = args.output.stat().st_size / 1e6
        print(f"{len(rows)} pictures in {args.output} ({size:.1f} MB; {cache.name} beside it speeds up the next time)")
    return 0


def _picture(name: str, args: argparse.Namespace) -> Path:
    """Where a picture is: below --images, else as the name says from here, else from the file of scores."""
    if args.images is not None:
        return Path(args.images, name)
    return Path(name) if Path(name).exists() else args.scores.parent / name


def _made_with(scores: Path) -> dict[str, Any]:
    """What the file of scores says of itself."""
    try:
        meta = score_files.read_meta(scores)
    except score_files.RecordError:
        return {"scores": scores.name, "model": "not stated: no .meta.json lies beside the file of scores"}
    return {"scores": scores.name, **meta}
