"""Speed on this machine: import, cold start, throughput, one-pass readout against sampling, as CSV.

    python benchmarks/speed.py [--model nano] [--device cpu] [--pictures 48] [-o benchmarks/speed.csv]

One row a measure, times are medians. Pictures are 512x512 JPEG files of smooth shapes with noise, made here; decoding
them is part of the time.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = (
    "date", "commit", "machine", "versions", "model", "revision", "device", "threads", "measure", "value", "unit",
    "command",
)  # fmt: skip
SIDE = 512
#: An answer such as <answer>3.52</answer> is about nine tokens, so this leaves room and favours sampling.
REPLY_TOKENS = 24


def main() -> None:
    """Measure and print, or append to a file."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as vqr1 does; torch reads it when it loads
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=48, help="for the throughput; sampling takes a quarter of them")
    parser.add_argument("--repeats", type=int, default=5, help="of every measure; the median counts")
    parser.add_argument("-o", "--output", type=Path, help="append the rows to this CSV instead of printing them")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        pictures = make_pictures(Path(folder), args.pictures)
        measured = [*start_up(args, pictures[0]), *throughput(args, pictures)]

    from vqr1_metric.scorer import QualityScorer

    facts = about_this_run(args, QualityScorer(args.model, device=args.device).backend.revision)
    new = args.output is None or not args.output.exists()
    with open(args.output, "a", newline="") if args.output else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**facts, "measure": m, "value": f"{v:.3g}", "unit": unit} for m, v, unit in measured)


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Write pictures and return their paths."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    paths = [folder / f"{i:03}.jpg" for i in range(count)]
    for path in paths:
        waves = [np.sin(x * random.uniform(5, 60) + y * random.uniform(5, 60)) for _ in range(3)]
        noise = random.normal(0, random.uniform(0, 20), (SIDE, SIDE, 3))
        Image.fromarray((128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def start_up(args: argparse.Namespace, picture: Path) -> Iterator[tuple[str, float, str]]:
    """Fresh processes: an import, the help text, one picture."""
    timed = "import time; t = time.perf_counter(); import vqr1_metric; print(time.perf_counter() - t)"
    seconds = [float(run([sys.executable, "-c", timed])) for _ in range(args.repeats)]
    yield "import vqr1_metric", statistics.median(seconds), "s"
    vqr1 = [sys.executable, "-m", "vqr1_metric.cli"]
    yield "vqr1 --help", seconds_of(lambda: run([*vqr1, "--help"]), args.repeats), "s"
    command = [*vqr1, "score", str(picture), "--model", args.model, "--device", args.device, "--silent"]
    yield "vqr1 score, one picture, cold", seconds_of(lambda: run(command), args.repeats), "s"


def throughput(args: argparse.Namespace, pictures: list[Path]) -> Iterator[tuple[str, float, str]]:
    """One warm process: pictures a second, and how long a picture takes read out in one pass and by sampling."""
    from vqr1_metric.scorer import QualityScorer

    scorer = QualityScorer(args.model, device=args.device, num_samples=6, max_new_tokens=REPLY_TOKENS)
    sampling = scorer.replace(mode="sample")
    few = pictures[: max(1, len(pictures) // 4)]
    scorer.score(pictures[:2])
    limit = scorer.pixel_config.max_pixels
    seconds = seconds_of(lambda: scorer.score(pictures), args.repeats)
    yield f"{SIDE}x{SIDE} pictures at max_pixels {limit}", len(pictures) / seconds, "pictures/s"
    one_pass = seconds_of(lambda: scorer.score(few), args.repeats)
    sampled = seconds_of(lambda: sampling.score(few), args.repeats)
    yield "one-pass readout", one_pass / len(few), "s/picture"
    yield f"6 sampled replies of at most {REPLY_TOKENS} tokens", sampled / len(few), "s/picture"
    yield "sampling / one-pass", sampled / one_pass, "times"


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Median wall time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(command: list[str]) -> str:
    """Standard output of a program that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def about_this_run(args: argparse.Namespace, revision: str) -> dict[str, object]:
    """Where, when and with what the figures were measured."""
    import torch

    root = Path(__file__).resolve().parents[1]
    try:
        commit = run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    on_gpu = args.device.startswith("cuda")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit,
        "machine": torch.cuda.get_device_name(args.device) if on_gpu else processor(),
        "versions": f"python {platform.python_version()}, {packages}", "model": args.model, "revision": revision,
        "device": args.device, "threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def processor() -> str:
    """The processor's name and how many cores this process sees."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
