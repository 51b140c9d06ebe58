"""The tables of docs/speed.md from a CSV of the speed benchmark.

    python -m benchmarks.speed.scoring_table benchmarks/results/scoring.csv [--write docs/speed.md]

What is written goes between two markers on the page; tests/test_speed_benchmark.py holds the page to the file.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

BEGIN, END = "<!-- from the CSV: -->\n", "<!-- end -->\n"
STAGES = ("decoding", "preprocessing", "vision tower", "language model", "readout", "everything else")


def tables(path: Path) -> str:
    """Markdown; a figure that was not measured is a dash."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    values = {(row["lane"], row["measure"]): float(row["value"]) for row in rows}
    lanes = list(dict.fromkeys(row["lane"] for row in rows))
    about = rows[0]
    others = dict.fromkeys(f"{r['revision']} at {r['commit']}" for r in rows if r["commit"] != about["commit"])
    lines = [
        f"    {about['command']}\n",
        f"{about['model']} {about['revision']}, {about['dtype']} on {about['machine']}, {about['threads']} threads, "
        f"{about['versions']}, commit {about['commit']}, {about['date']}. Matrix products reached "
        f"{values['machine', 'matrix products'] / 1e9:,.0f} GFLOP/s, copying "
        f"{values['machine', 'memory bandwidth'] / 1e9:,.0f} GB/s.\n",
        *([f"Growth and batch mates were measured before, with {', '.join(others)}.\n"] if others else []),
        *_table(
            ("lane", "pictures/s", "processor ms a picture", "first score (s)", "memory (MiB)", "against one pass"),
            _lanes(values, lanes),
        ),
        "Against one pass: time by the clock, then processor time. Memory: of tensors beyond the weights, at most.\n",
        *_table(("lane", *STAGES, "floor (ms)", "share of the rate"), _stages(values, lanes)),
        *_table(("pictures in a stream", "seconds", "processor seconds", "memory (MiB)"), _growth(values, lanes)),
        *_table(("one picture's score, two batches", "alone or in 64", "at another position"), _moved(values, lanes)),
        *_table(("start", "seconds"), [(name, f"{v:.2g}") for (lane, name), v in values.items() if lane == "start"]),
    ]
    return "\n".join(lines)


def _table(head: tuple[str, ...], body: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> Iterator[str]:
    body = list(body)
    if body:
        yield "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in body)
        yield ""


def _lanes(values: dict, lanes: list[str]) -> Iterator[tuple[str, ...]]:
    for lane in lanes:
        if (lane, "speed") in values:
            ratios = [values.get((lane, f"{kind} against one pass")) for kind in ("time", "processor time")]
            yield (
                lane,
                f"{values[lane, 'speed']:.1f}",
                f"{values[lane, 'processor time'] * 1e3:.0f}",
                f"{values[lane, 'time to first score']:.2f}",
                f"{values[lane, 'peak memory of tensors beyond the weights']:.0f}",
                "–" if None in ratios else ", ".join(f"{ratio:.1f}" for ratio in ratios),
            )


def _stages(values: dict, lanes: list[str]) -> Iterator[tuple[str, ...]]:
    for lane in lanes:
        if (lane, "floor") in values:
            shares = [values[lane, f"share of {stage}"] for stage in STAGES]
            reached = values[lane, "share of the rate of matrix products"]
            yield lane, *(f"{s:.0%}" for s in shares), f"{values[lane, 'floor'] * 1e3:.1f}", f"{reached:.0%}"


def _growth(values: dict, lanes: list[str]) -> Iterator[tuple[str, ...]]:
    for lane in lanes:
        if (lane, "seconds so far") in values:
            memory = values[lane, "most memory so far beyond what was held"]
            busy = values.get((lane, "processor seconds so far"))
            spent = "–" if busy is None else f"{busy:.0f}"
            yield f"{int(lane.split()[-5]):,}", f"{values[lane, 'seconds so far']:.0f}", spent, f"{memory:.1f}"


def _moved(values: dict, lanes: list[str]) -> Iterator[tuple[str, ...]]:
    for lane in lanes:
        if (lane, "at another position") in values:
            yield lane, *(f"{values[lane, how]:.1g}" for how in ("alone and in a batch of 64", "at another position"))


def main(arguments: list[str] | None = None) -> None:
    """Print, or write into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the page's markers")
    args = parser.parse_args(arguments)
    if not args.write:
        print(tables(args.csv))
        return
    before, _, rest = args.write.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"Expected the lines {BEGIN.strip()!r} and {END.strip()!r} in {args.write}.")
    args.write.write_text(before + BEGIN + tables(args.csv) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
