"""``vqr1 diff``: two folders of the same scenes: which method is better, and how surely."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from vqr1_metric.cli import CommandError
from vqr1_metric.cli.options import add_bootstrap_options, add_model_options, build_scorer, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a folder of pictures")
    parser.add_argument("after", type=Path, metavar="AFTER", help="a folder of the same scenes under the same names")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the scenes' scores and differences as .csv")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the scores here, and use those that are there")
    add_bootstrap_options(parser)
    parser.add_argument("--json", action="store_true", help="the answer and all scenes as JSON")
    parser.add_argument("--silent", action="store_true", help="no progress bar")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Score both folders, print the answer; 1 if no scene has two scores."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise CommandError("vqr1 diff needs SciPy: pip install 'vqr1-metric[evaluate]'") from None
    if args.output is not None and not args.output.parent.is_dir():
        raise CommandError(f"no folder {str(args.output.parent)!r} to write {args.output.name!r} into")
    from vqr1_metric.evaluation.paired import compare_paired, match_folders, win_probabilities
    from vqr1_metric.evaluation.scoring import made_by, score_items
    from vqr1_metric.ratings import RatedImage

    scenes, problems = match_folders(args.before, args.after)
    for problem in problems:
        print(f"vqr1: {problem.subject}: {problem.detail}", file=sys.stderr)
    scorer = build_scorer(args)
    items = [RatedImage(scene, path=path) for scene, *paths in scenes for path in paths]
    with tempfile.TemporaryDirectory() as folder, progress(len(items), silent=args.silent) as bar:
        rows = score_items(scorer, items, args.cache or Path(folder), progress=bar.update)
    before, after = rows[::2], rows[1::2]
    wins = win_probabilities(before, after)
    found = compare_paired(
        _scores(before), _scores(after), wins, level=args.level, resamples=args.resamples, seed=args.seed or 0
    )
    table = _table(scenes, before, after, wins)
    if args.output is not None:
        _write(args.output, table)
    if found.n == 0:
        reasons = "; ".join(f"{row['path']}: {row['error']}" for row in rows if row["error"])
        raise CommandError(f"no scene has two scores ({reasons})")
    if args.json:
        from vqr1_metric.evaluation.tables import jsonable

        answer = {**asdict(found), "identity": made_by(scorer), "scenes": table}
        print(json.dumps(jsonable(answer), indent=1))
    else:
        print(_as_text(args, found, [row for row in rows if row["error"]]))
    return 0


def _scores(rows: list[dict]) -> list[float]:
    return [float("nan") if row["score"] is None else row["score"] for row in rows]


def _table(scenes, before, after, wins) -> list[dict]:
    table = []
    for (scene, *_), first, second, win in zip(scenes, before, after, wins, strict=True):
        known = first["score"] is not None and second["score"] is not None
        gap = second["score"] - first["score"] if known else float("nan")
        table.append(
            {"scene": scene, "before": first["score"], "after": second["score"], "difference": gap, "after_wins": win}
        )
    return table


def _write(path: Path, table: list[dict]) -> None:
    import csv

    from vqr1_metric.score_files import cell

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table[0])
        for row in table:
            numbers = ["" if v is None or v != v else f"{v:.6f}" for v in list(row.values())[1:]]
            writer.writerow([cell(row["scene"]), *numbers])


def _as_text(args: argparse.Namespace, found, failed: list[dict]) -> str:
    low, high = found.interval
    lines = [f"no score: {row['path']}: {row['error']}" for row in failed]
    lines.append(f"{found.n} scenes: after is better in {found.better}, worse in {found.worse}, equal in {found.equal}")
    if found.reason:
        return "\n".join([*lines, found.reason])
    lines.append(
        f"mean difference {found.mean:+.3f}, {found.level:.0%} interval {low:+.3f} to {high:+.3f} "
        f"(bootstrap p = {found.p_bootstrap:.2g}, Wilcoxon p = {found.p_wilcoxon:.2g})"
    )
    if found.win_probability == found.win_probability:
        lines.append(
            f"chance that after looks better in a scene, from the score distributions: {found.win_probability:.1%}"
        )
    names = {"after": args.after, "before": args.before}
    if found.verdict == "open":
        lines.append("verdict: open, the interval holds 0")
        needed = "no number of scenes would" if found.needed is None else f"about {found.needed} scenes would"
        lines.append(f"to settle a difference of this size (80% power): {needed}; there are {found.n}")
    else:
        enough = "" if found.needed is None else f" ({found.needed} scenes suffice for a difference of this size)"
        lines.append(f"verdict: {names[found.verdict]} is better{enough}")
    return "\n".join(lines)
