"""Load test of `vqr1 serve` on loopback: throughput against the library in process, nothing lost, bad input refused.

    python benchmarks/speed/serve_load.py [--model nano] [--pictures 96] [--clients 8] \
        [-o benchmarks/results/serve_load.csv]

Starts a server of its own on a free port and stops it. Bounded: every picture is sent once, and the whole run ends
after ten minutes. Pictures are JPEG files of smooth shapes with noise, made here; one request in ten is bad.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

COLUMNS = (
    "date",
    "commit",
    "machine",
    "cores",
    "load",
    "model",
    "pictures",
    "side",
    "clients",
    "a_request",
    "library_per_s",
    "serve_per_s",
    "ratio",
    "median_s",
    "p95_s",
    "largest_difference",
    "lost",
    "refused",
    "bad",
)
_LONGEST = 600


def main() -> None:
    """Measure, check, print, and append a row if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--side", type=int, default=256, help="width and height of a picture")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--a-request", type=int, default=2, help="pictures in a request")
    parser.add_argument("-o", "--output", type=Path, help="append a row to this CSV")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"not done within {_LONGEST} s"))
    signal.alarm(_LONGEST)

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads, as the command line does for the service
    pictures = [make_picture(i, args.side) for i in range(args.pictures)]
    expected, library = in_process(args.model, pictures)
    with server(args.model) as address:
        answers, seconds = load(address, pictures, args)
    _, again = in_process(args.model, pictures)
    library = max(library, again)  # before and after, as other work on the machine may slow down either
    row = report(args, expected, library, answers, seconds)
    for name, value in row.items():
        print(f"{name:<20} {value}")
    if args.output:
        new = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
    if row["lost"] or row["refused"] != row["bad"] or row["largest_difference"] > 0.01:
        sys.exit("something was lost, scored differently, or not refused")


def make_picture(seed: int, side: int) -> bytes:
    """Smooth shapes with a little noise, as a JPEG file."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 2 + seed % 20, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def in_process(model: str, pictures: list[bytes]) -> tuple[list[float], float]:
    """Scores and pictures a second of the library itself."""
    from vqr1_metric.scorer import QualityScorer

    scorer = QualityScorer(model, device="cpu")
    scorer.score(pictures[:2])
    started = time.perf_counter()
    scores = [result.score for result in scorer.score(pictures)]
    return scores, len(pictures) / (time.perf_counter() - started)


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """A server of its own; gives its address."""
    command = [sys.executable, "-m", "vqr1_metric.cli", "serve", "--model", model, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            sys.exit("the server did not start")
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def load(address: str, pictures: list[bytes], args: argparse.Namespace) -> tuple[list[tuple], float]:
    """Send every picture once, and a bad request for every nine good ones."""
    requests: list[tuple[list[int], dict]] = []
    for start in range(0, len(pictures), args.a_request):
        indices = list(range(start, min(start + args.a_request, len(pictures))))
        requests.append((indices, {"files": [("images", (str(i), pictures[i])) for i in indices]}))
        if len(requests) % 10 == 9:
            bad = ({"files": [("images", ("x", b"no picture"))]}, {"json": {"images": [1]}}, {"content": b"x"})
            requests.append(([], bad[len(requests) // 10 % 3]))

    with httpx.Client(base_url=address, timeout=_LONGEST, trust_env=False) as client:

        def send(request: tuple[list[int], dict]) -> tuple[list[int], int, dict, float]:
            started = time.perf_counter()
            answer = client.post("/v1/score", **request[1])
            return request[0], answer.status_code, answer.json(), time.perf_counter() - started

        client.post("/v1/score", **requests[0][1])
        started = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as clients:
            answers = list(clients.map(send, requests))
        return answers, time.perf_counter() - started


def report(args, expected: list[float], library: float, answers: list[tuple], seconds: float) -> dict:
    """A row of the CSV."""
    scores: dict[int, float] = {}
    statuses = Counter()
    for indices, status, body, _ in answers:
        if not indices:
            statuses["bad"] += 1
            statuses["refused"] += 400 <= status < 500
        elif status == 200:
            scores.update(zip(indices, (result["score"] for result in body["results"]), strict=True))
    times = sorted(took for indices, *_, took in answers if indices)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    rate = len(scores) / seconds
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git.stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute; this test by itself makes about 2
        "model": args.model,
        "pictures": args.pictures,
        "side": args.side,
        "clients": args.clients,
        "a_request": args.a_request,
        "library_per_s": round(library, 2),
        "serve_per_s": round(rate, 2),
        "ratio": round(rate / library, 2),
        "median_s": round(statistics.median(times), 3),
        "p95_s": round(times[int(0.95 * (len(times) - 1))], 3),
        "largest_difference": round(max((abs(scores[i] - expected[i]) for i in scores), default=9.0), 5),
        "lost": args.pictures - len(scores),
        "refused": statuses["refused"],
        "bad": statuses["bad"],
    }


if __name__ == "__main__":
    main()
