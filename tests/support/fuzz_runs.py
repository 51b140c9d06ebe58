"""Runs with random names, runs that are killed, and runs that want one file, on a model that is a formula.

    python tests/support/fuzz_runs.py names 1000 0
    python tests/support/fuzz_runs.py kills 200 0
    python tests/support/fuzz_runs.py races 50 0
    python tests/support/fuzz_runs.py evaluations 50 0

COUNT and SEED follow. Each prints one JSON line of counts, or raises at the first row lost, doubled or made up.
Children are forked, so that a kill costs no import; they are killed with SIGKILL.
"""

import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from stub_scorer import formula_scorer

from vqr1_metric.score_files import RecordError, read_rows, unescape_name
from vqr1_metric.score_merge import merge
from vqr1_metric.score_runs import score_to_file, shard_path

SUFFIXES = (".csv", ".jsonl")


def random_name(rng: random.Random) -> bytes:
    """Any bytes that a file may be called, the awkward ones more often."""
    special = b"\\\n\r\t \"',;#=+-@\x1b\x7f\x00/\xff\xfe\xc3\xa9\xe2\x80\xa8\xed\xb3\xbe%~$*?[]"
    data = bytes(
        rng.choice(special) if rng.random() < 0.5 else rng.randrange(1, 256) for _ in range(rng.randint(1, 40))
    )
    return data.replace(b"/", b"_").replace(b"\0", b"_").lstrip(b".") + rng.choice((b".png", b".PNG"))


def write_images(folder: Path, names: list[bytes]) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    for number, name in enumerate(names):
        pixels[..., 0] = number % 256
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            Image.fromarray(pixels).save(file, "PNG")


def fuzz_names(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Every name has one row in each kind of file, whose bytes come back; resuming and merging add nothing."""
    rng = random.Random(seed)
    names = list({random_name(rng) for _ in range(count)})
    write_images(folder / "images", names)
    for suffix in SUFFIXES:
        output = folder / f"scores{suffix}"
        summary = score_to_file(formula_scorer(), [folder / "images"], output)
        expect(summary["scored"] == len(names), summary)
        check_names(output, names)
        scorer = formula_scorer()
        score_to_file(scorer, [folder / "images"], output, resume=True)
        expect(scorer.backend.pictures == 0, "resuming scored something again")
        for part in (1, 2, 3):
            score_to_file(formula_scorer(), [folder / "images"], folder / f"part{suffix}", shard=(part, 3))
        parts = [shard_path(folder / f"part{suffix}", part, 3) for part in (1, 2, 3)]
        expect(merge(parts, folder / f"merged{suffix}") == (len(names), 0), "merging")
        check_names(folder / f"merged{suffix}", names)
    return {"names": len(names)}


def check_names(output: Path, names: list[bytes]) -> None:
    found = [os.path.basename(os.fsencode(name)) for name, _ in read_rows(output)]
    expect(sorted(found) == sorted(names), "names differ")
    text = output.read_text(encoding="utf-8")  # which is UTF-8, and a line a row, whoever splits it
    lines = text.splitlines()
    expect(len(lines) == len(names) + (output.suffix == ".csv"), "rows are not lines")
    rows = csv.DictReader(lines) if output.suffix == ".csv" else map(json.loads, lines)
    raw = [os.fsencode(unescape_name(row["path"].removeprefix("'"))) for row in rows]
    expect(sorted(map(os.path.basename, raw)) == sorted(names), "names differ for other readers")


def fuzz_kills(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Runs into one file, killed at random and resumed until one ends: each image has one row, with its score."""
    rng = random.Random(seed)
    names = [b"%03d.png" % i for i in range(150)]
    write_images(folder / "images", names)
    expected = {Path(r.name).name: r.score for r in formula_scorer().score_folder(folder / "images")}
    kills = finished = torn = 0
    while kills < count:
        output = folder / f"scores{rng.choice(SUFFIXES)}"
        options = {"resume": True} if output.exists() else {}
        if output.exists() and rng.random() < 0.3:
            options = {"retry_errors": True}
        child = fork(
            lambda output=output, options=options: score_to_file(slow_scorer(), [folder / "images"], output, **options)
        )
        time.sleep(rng.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        expect(not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a run failed")
        kills += os.WIFSIGNALED(status)
        if output.exists():
            data = output.read_bytes()
            torn += not data.endswith(b"\n") and bool(data)
        if os.WIFEXITED(status) or rng.random() < 0.05:
            score_to_file(formula_scorer(), [folder / "images"], output, resume=True)
            check_scores(output, expected)
            finished += 1
            output.unlink()
    return {"kills": kills, "files_completed_and_checked": finished, "torn_lines": torn}


def check_scores(output: Path, expected: dict[str, float]) -> None:
    rows = [(Path(name).name, score) for name, score in read_rows(output)]
    expect(len(rows) == len(expected) and dict(rows).keys() == expected.keys(), f"{len(rows)} rows")
    expect(all(abs(score - expected[name]) < 1e-5 for name, score in rows), "scores differ")


def fuzz_races(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Two runs at a time into one file, started within a few milliseconds: one has it, nothing is lost or doubled."""
    rng = random.Random(seed)
    names = [b"%03d.png" % i for i in range(20)]
    write_images(folder / "images", names)
    refused = 0
    for number in range(count):
        output = folder / f"{number}{rng.choice(SUFFIXES)}"
        if rng.random() < 0.5:  # one that there is
            score_to_file(formula_scorer(), [folder / "images" / "000.png"], output)
        children = []
        for _ in range(2):
            children.append(fork(lambda output=output: refuse_or_score(folder, output)))
            time.sleep(rng.uniform(0, 0.03))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        expect(0 in codes and set(codes) <= {0, 3}, codes)
        refused += codes.count(3)
        found = [Path(name).name.encode() for name, _ in read_rows(output)]
        expect(sorted(found) == sorted(names), f"{len(found)} rows")
    return {"races": count, "refused": refused}


def fuzz_evaluations(count: int, seed: int, folder: Path) -> dict[str, int]:
    """``vqr1 evaluate`` killed at random and started again: what it writes in the end is what one run writes."""
    from vqr1_metric import cli
    from vqr1_metric.cli import evaluate

    rng = random.Random(seed)
    names = [b"%03d.png" % i for i in range(80)]
    write_images(folder / "images", names)
    labels = folder / "images" / "labels.csv"
    labels.write_text("image,mos\n" + "".join(f"{name.decode()},{1 + i % 5}\n" for i, name in enumerate(names)))
    evaluate.build_scorer = lambda args: slow_scorer()
    options = ["evaluate", "--labels", str(labels), "--no-baselines", "--no-page", "--resamples", "20", "--silent"]

    def tables(output: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(output.glob("*.csv"))}

    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    expect(cli.main([*options, "-o", str(folder / "whole")]) == 0, "a run failed")
    expected = tables(folder / "whole")
    expect(bool(expected), "nothing was written")
    kills = finished = 0
    while kills < count:
        output = folder / f"out{finished}"
        child = fork(lambda output=output: expect(cli.main([*options, "-o", str(output)]) == 0, "a run failed"))
        time.sleep(rng.uniform(0, 1.0))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        expect(status in (0, -signal.SIGKILL), "a run failed")
        kills += status != 0
        if status == 0 or rng.random() < 0.2:
            expect(cli.main([*options, "-o", str(output)]) == 0, "a run failed")
            expect(tables(output) == expected, "other tables")
            finished += 1
    return {"kills": kills, "evaluations_completed_and_compared": finished}


def refuse_or_score(folder: Path, output: Path) -> None:
    try:
        score_to_file(formula_scorer(), [folder / "images"], output, resume=True)
    except RecordError as error:
        expect("another run is writing" in str(error), error)
        os._exit(3)


def slow_scorer():
    """One whose batches take a few milliseconds, so that kills find it in the middle."""
    scorer = formula_scorer()
    scorer.batch_tokens = 40
    score = scorer.backend.distributions

    def slowly(*args, **options):
        time.sleep(0.004)
        return score(*args, **options)

    scorer.backend.distributions = slowly
    return scorer


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def expect(condition: bool, message: object) -> None:
    if not condition:
        raise RuntimeError(message)


FUZZERS = {"names": fuzz_names, "kills": fuzz_kills, "races": fuzz_races, "evaluations": fuzz_evaluations}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # a fork has no other threads
    with tempfile.TemporaryDirectory() as place:
        kind, number, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        answer = sys.stdout if kind != "evaluations" else os.fdopen(os.dup(1), "w")
        print(json.dumps(FUZZERS[kind](number, start, Path(place))), file=answer, flush=True)
