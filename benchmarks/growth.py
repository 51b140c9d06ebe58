"""Time and memory from a thousand images to a million: each command in a process of its own, on the same files.

    python -m benchmarks.growth --counts 1000 10000 -o benchmarks/results/growth.csv
    python -m benchmarks.growth --counts 1000 10000 100000 1000000 --pictures DIR -o growth.csv      hours

The files are hard links to a few hundred thumbnails of 64x64 under generated names, so that a million takes no disk.
What must hold: seconds grow as the number of images, memory does not. ``score`` runs once, and once more as several
``--shards``; ``evaluate`` and ``diff`` read its file of scores, so that what they add is seen.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.speed.scoring_measure import commit, processor_name
from benchmarks.speed.scoring_pictures import make_pictures

COLUMNS = ("command", "images", "seconds", "images_per_second", "peak_mib", "machine", "commit")
THUMBNAILS, SIDE = 200, 64
#: The metric over batches of tensors, as a validation loop feeds it.
METRIC = """
import sys, torch
from vqr1_metric import VisualQualityR1Score
count, metric = int(sys.argv[1]), VisualQualityR1Score("nano", device="cpu")
batch = torch.rand(50, 3, 64, 64, generator=torch.Generator().manual_seed(0))
for _ in range(count // 50):
    metric.update(batch)
print(float(metric.compute()))
"""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Measure every command at every count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--pictures", type=Path, help="folder of images to make the thumbnails of (default: made here)")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    rows = []
    with args.output.open("w", newline="") as file, tempfile.TemporaryDirectory(dir=args.output.parent) as work:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        thumbnails = make_thumbnails(Path(work), args.pictures)
        for count in args.counts:
            for row in measure(Path(work, str(count)), thumbnails, count, args.shards):
                rows.append(row | {"machine": processor_name(), "commit": commit()})
                writer.writerow(rows[-1])
                file.flush()
                print(f"{row['command']:<28} {count:>8} {row['seconds']:>9} s {row['peak_mib']:>7} MiB", flush=True)
    return rows


def make_thumbnails(folder: Path, pictures: Path | None) -> list[Path]:
    found = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".webp")) if pictures else []
    sources = found[:THUMBNAILS] or make_pictures("256", THUMBNAILS // 4, "pil", "cpu", folder)
    files = []
    for i, source in enumerate(sources):
        image = source if isinstance(source, Image.Image) else Image.open(source)
        files.append(folder / f"thumbnail-{i}.png")
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(files[-1])
    return files


def measure(folder: Path, thumbnails: Sequence[Path], count: int, shards: int) -> Iterator[dict[str, object]]:
    images = folder / "images"
    draw = random.Random(0)
    for i in range(count):
        name = images / f"{i // 1000:04}" / f"{draw.getrandbits(64):016x}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        os.link(thumbnails[i % len(thumbnails)], name)
    labels, scores, other = folder / "labels.csv", folder / "scores.csv", folder / "other.csv"
    vqr1 = [sys.executable, "-m", "vqr1_metric.cli"]
    score = [*vqr1, "score", str(images), "-r", "--model", "nano", "--device", "cpu", "--silent", "-o"]
    yield timed("score", count, [*score, str(scores)])
    with scores.open(newline="") as file, labels.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "mos"])
        for row in csv.DictReader(file):
            writer.writerow([os.path.relpath(row["path"], images), f"{float(row['score']) + draw.gauss(0, 0.3):.4f}"])
    other.write_bytes(scores.read_bytes())
    shard_files = [folder / f"shard-{i}.csv" for i in range(shards)]
    commands = [[*score, str(f), "--shard", f"{i + 1}/{shards}"] for i, f in enumerate(shard_files)]
    yield timed(f"score, {shards} shards", count, *commands)
    evaluate = [*vqr1, "evaluate", "--labels", str(labels), "--images", str(images), "--scores", f"nano={scores}"]
    yield timed("evaluate a file of scores", count, [*evaluate, "-o", str(folder / "results"), "--silent"])
    yield timed("diff of two files of scores", count, [*vqr1, "diff", str(scores), str(other), "--silent"])
    yield timed("metric", count, [sys.executable, "-c", METRIC, str(count)])


def timed(name: str, count: int, *commands: list[str]) -> dict[str, object]:
    """Wall seconds and the largest process of commands that run side by side."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        processes = [subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=errors) for run in commands]
        peaks = []
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peaks.append(usage.ru_maxrss)
        if any(process.returncode for process in processes):
            errors.seek(0)
            raise RuntimeError(f"{name} ended with {processes[0].returncode}:\n{errors.read().decode()[-2000:]}")
    seconds = time.perf_counter() - start
    return {
        "command": name,
        "images": count,
        "seconds": round(seconds, 1),
        "images_per_second": round(count / seconds, 1),
        "peak_mib": max(peaks) // 1024,
    }


if __name__ == "__main__":
    main()
