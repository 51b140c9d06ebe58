"""Speed of scoring: the authors' procedure and the one-pass readout, in turn, on the same pictures and model.

    python -m benchmarks.speed.scoring [--model nano] [--device cpu] [-o benchmarks/results/scoring.csv]      make bench
    python -m benchmarks.speed.scoring --model 7b --device cuda       the 7B architecture, random weights on the device
    python -m benchmarks.speed.scoring --growth 100000                time and memory over many small pictures
    python -m benchmarks.speed.scoring --all -o benchmarks/results/scoring.csv    all of it, the file written anew
    python -m benchmarks.speed.scoring_table benchmarks/results/scoring.csv --write docs/speed.md
                                                                      the page's tables from that file

Every lane runs once per repeat, one after the other, so that a busy machine hits all alike; the best of the repeats
counts, and what matters are the ratios within one run; where other programs share the cores, those of processor time.
Peak memory and the shares of decoding, preprocessing, vision tower, language model and readout come from passes of
their own. The floor is operations over the rate of matrix products, or bytes over the bandwidth, both measured in the
same run. Pictures are smooth waves with noise, made here. On shared cores set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed.backward_memory import peak_bytes
from benchmarks.speed.scoring_authors import BATCH, authors_scores
from benchmarks.speed.scoring_floor import matmul_rate, memory_bandwidth, operations, synchronise, weight_bytes
from benchmarks.speed.scoring_measure import COLUMNS, PeakMemory, about_this_run, start_up, time_by_stage
from benchmarks.speed.scoring_models import ARCHITECTURES, make_backend, packed_prompts, stock_tower
from benchmarks.speed.scoring_pictures import make_pictures, parse_size
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.scorer import QualityScorer

Row = tuple[str, str, float, str]  # lane, measure, value, unit
#: Sizes that share a batch when it is measured what that changes; the narrow ones are padded.
BATCH_MATES = ("256", "288x256")


@dataclass
class Lane:
    """One way to score some pictures; ``run`` yields whenever scores are there."""

    name: str
    images: list
    run: Callable[[list], Iterator]
    batch: int
    scorer: QualityScorer | None = None
    best: float = float("inf")
    processor: float = float("inf")
    first: float = float("inf")


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, and print or append to a file."""
    args = parse(arguments)
    warnings.filterwarnings("ignore", message=".*of the model's answers")
    backend = make_backend(args.model, args.device, args.dtype)
    facts = about_this_run(backend, args.device)  # now, since the checkout may move on meanwhile
    rows: list[Row] = []
    if args.all or not (args.growth or args.invariance):
        rows += all_lanes(backend, args)
    if args.start_up or (args.all and args.model not in ARCHITECTURES):  # a random model is no command's --model
        rows += start_up(args.model, args.device, args.repeats)
    if args.all or args.invariance:
        rows += invariance(args)
    if args.all or args.growth:
        rows += growth(backend, args)
    new = args.all or args.output is None or not args.output.exists()
    with open(args.output, "w" if new else "a", newline="") if args.output else nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for lane, measure, value, unit in rows:
            writer.writerow({**facts, "lane": lane, "measure": measure, "value": f"{value:.4g}", "unit": unit})
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano, 7b, thin, tiny, or a folder or Hub name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 (default: the scorer's own)")
    parser.add_argument("--sizes", nargs="+", default=["512", "224", "1024x768", "2048x1536", "mixed"])
    parser.add_argument("--kinds", nargs="+", default=["tensor", "pil", "file"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--pictures", type=int, default=32, help="of a lane")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--start-up", action="store_true", help="also import, help and a first picture, cold")
    parser.add_argument("--all", action="store_true", help="everything, growth to 100,000 too; writes the CSV anew")
    parser.add_argument("--growth", type=int, default=0, metavar="N", help="only: N pictures of 64x64 in a stream")
    parser.add_argument("--invariance", action="store_true", help="only: what batch mates change in a score")
    parser.add_argument("-o", "--output", type=Path, help="append the rows to this CSV instead of printing them")
    return parser.parse_args(arguments)


def all_lanes(backend: TransformersBackend, args: argparse.Namespace) -> list[Row]:
    """The machine's rates and every lane."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [*machine(backend, args)]
        rates = {measure: value for _, measure, value, _ in rows}
        lanes = make_lanes(backend, args, Path(folder))
        run_in_turn(lanes, args)
        for lane in lanes:
            rows += report(lane, backend, rates, args)
        return [*rows, *ratios(lanes)]


def make_lanes(backend: TransformersBackend, args: argparse.Namespace, folder: Path) -> list[Lane]:
    """The first size in every kind and batch; the other sizes as tensors; the authors' procedure beside each."""
    plain = QualityScorer(backend=backend)
    limit = backend.pixel_config.max_pixels
    lanes = []

    def both(label: str, images: list) -> None:
        lanes.append(Lane(f"one pass, {label}", images, plain.stream, len(images), plain))
        lanes.append(Lane(f"authors, {label}", images, partial(stock_authors, backend, limit), BATCH))

    first = args.sizes[0]
    for size in args.sizes:
        both(f"{size} tensor", make_pictures(size, args.pictures, "tensor", args.device, folder))
        if size == "mixed":
            mixed = lanes[-1].images
            lanes.append(Lane("packed, mixed tensor", mixed, partial(packed, backend), len(mixed)))
    for kind in args.kinds:
        if kind != "tensor":
            both(f"{first} {kind}", make_pictures(first, args.pictures, kind, args.device, folder))
    images = lanes[0].images
    lanes.append(
        Lane(f"authors with this vision tower, {first} tensor", images, partial(own_authors, backend, limit), BATCH)
    )
    for batch in args.batches:
        length = backend.sequence_length(backend.pixel_config.visual_tokens(*images[0].shape[-2:]), False)
        scorer = QualityScorer(backend=backend, batch_tokens=length * batch)
        some = (images * -(-max(batch, 8) // len(images)))[: max(batch, 8)]
        name = f"one pass, {first} tensor, batches of {batch}"
        lanes.append(Lane(name, some, partial(all_at_once, scorer), batch, scorer))
    alone = QualityScorer(backend=backend, deterministic=True)
    lanes.append(Lane(f"one pass, {first} tensor, deterministic", images, alone.stream, 1, alone))
    few = images[: max(2, len(images) // 4)]
    sampled = QualityScorer(backend=backend, mode="sample", num_samples=6, max_new_tokens=10)
    lanes.append(Lane(f"6 sampled replies, {first} tensor", few, sampled.stream, len(few)))
    single = QualityScorer(backend=backend, mode="sample", num_samples=1, max_new_tokens=10)
    apart = partial(six_times, single)
    lanes.append(Lane(f"6 sampled replies with a pass each, {first} tensor", few, apart, len(few)))
    by_generate = partial(stock_authors, backend, limit, replies=6)
    lanes.append(Lane(f"6 sampled replies by generate, {first} tensor", few, by_generate, BATCH))
    return lanes


def stock_authors(backend: TransformersBackend, limit: int, images: list, replies: int = 1) -> Iterator:
    """The authors' procedure on transformers' own vision tower."""
    with stock_tower(backend.model):
        yield from authors_scores(backend, images, limit, replies)


def own_authors(backend: TransformersBackend, limit: int, images: list) -> Iterator:
    """The authors' procedure on this package's vision tower: what FlashAttention-2 is to theirs."""
    yield from authors_scores(backend, images, limit)


def packed(backend: TransformersBackend, images: list) -> Iterator:
    """Without padding in the language model."""
    with packed_prompts(backend.model):
        yield from QualityScorer(backend=backend).stream(images)


def all_at_once(scorer: QualityScorer, images: list) -> Iterator:
    """Not in the windows of ``stream``, which end at 64 pictures."""
    yield scorer.distributions(images).mean.tolist()


def six_times(scorer: QualityScorer, images: list) -> Iterator:
    """Each picture six times, as if the replies had nothing in common."""
    return scorer.stream(image for image in images for _ in range(6))


def run_in_turn(lanes: list[Lane], args: argparse.Namespace) -> None:
    """Time every lane once per repeat, after a run of two pictures that warms it up."""
    for lane in lanes:
        list(lane.run(lane.images[:2]))
    for repeat in range(args.repeats):
        for number, lane in enumerate(lanes):
            print(f"repeat {repeat + 1}, lane {number + 1} of {len(lanes)}: {lane.name}", file=sys.stderr)
            synchronise(args.device)
            start, busy = time.perf_counter(), time.process_time()
            results = lane.run(lane.images)
            next(results)
            lane.first = min(lane.first, time.perf_counter() - start)
            for _ in results:
                pass
            synchronise(args.device)
            lane.best = min(lane.best, time.perf_counter() - start)
            lane.processor = min(lane.processor, time.process_time() - busy)


def report(
    lane: Lane, backend: TransformersBackend, rates: dict[str, float], args: argparse.Namespace
) -> Iterator[Row]:
    """What is known of a lane."""
    yield lane.name, "speed", len(lane.images) / lane.best, "pictures/s"
    yield lane.name, "processor time", lane.processor / len(lane.images), "s/picture"
    yield lane.name, "time to first score", lane.first, "s"
    peak = peak_bytes(lambda: list(lane.run(lane.images)), args.device)
    yield lane.name, "peak memory of tensors beyond the weights", peak / 2**20, "MiB"
    if lane.scorer is None:
        return
    for stage, share in time_by_stage(lane.scorer, lane.images, args.device).items():
        yield lane.name, f"share of {stage}", share, "of the time"
    grids = []
    for image in lane.images:
        height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else parse_size(args.sizes[0])
        side = backend.pixel_config.patch_size
        grids.append(tuple(edge // side for edge in lane.scorer.pixel_config.target_size(height, width)))
    by_rate = operations(backend, grids) / rates["matrix products"]
    by_bytes = weight_bytes(backend) * max(1, len(lane.images) // lane.batch) / rates["memory bandwidth"]
    yield lane.name, "floor", max(by_rate, by_bytes) / len(lane.images), "s/picture"
    yield lane.name, "share of the rate of matrix products", by_rate / lane.best, "of the time"


def ratios(lanes: list[Lane]) -> Iterator[Row]:
    """The one-pass readout against what it stands beside, by the clock and by processor time (all threads)."""
    named = {lane.name: lane for lane in lanes}
    for lane in lanes:
        procedure, _, label = lane.name.partition(", ")
        ours = named.get(f"one pass, {label}") if procedure != "one pass" else None
        if lane.name.endswith(", deterministic"):
            ours = named[lane.name.removesuffix(", deterministic")]
        if ours:
            pictures = len(ours.images) / len(lane.images)
            yield lane.name, "time against one pass", lane.best / ours.best * pictures, "times"
            yield lane.name, "processor time against one pass", lane.processor / ours.processor * pictures, "times"


def machine(backend: TransformersBackend, args: argparse.Namespace) -> Iterator[Row]:
    """Rates that the floor is made of."""
    yield "machine", "matrix products", matmul_rate(args.device, backend.model.dtype), "operations/s"
    yield "machine", "memory bandwidth", memory_bandwidth(args.device), "bytes/s"


def growth(backend: TransformersBackend, args: argparse.Namespace) -> Iterator[Row]:
    """Seconds and memory at marks on the way to many pictures."""
    scorer = QualityScorer(backend=backend)
    pictures = make_pictures("64", 64, "tensor", args.device, Path())
    most = args.growth or 100_000
    marks = [mark for mark in (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000) if mark < most] + [most]
    list(scorer.stream(pictures))
    with PeakMemory(args.device) as peak:
        start, busy = time.perf_counter(), time.process_time()
        stream = scorer.stream(pictures[i % len(pictures)] for i in range(most))
        for done, _ in enumerate(stream, start=1):
            if done == marks[0]:
                lane = f"one pass, 64 tensor, {marks.pop(0)} pictures in a stream"
                print(f"{done} pictures, {time.perf_counter() - start:.0f} s, {peak.so_far():.0f} MiB", file=sys.stderr)
                yield lane, "seconds so far", time.perf_counter() - start, "s"
                yield lane, "processor seconds so far", time.process_time() - busy, "s"
                yield lane, "most memory so far beyond what was held", peak.so_far(), "MiB"


def invariance(args: argparse.Namespace) -> Iterator[Row]:
    """Largest difference of a picture's score: alone, in a batch of 64, and elsewhere in that batch."""
    for dtype in ("float32", "bfloat16"):
        backend = make_backend(args.model, args.device, dtype)
        narrow, wide = (make_pictures(size, 32, "tensor", args.device, Path()) for size in BATCH_MATES)
        pictures = [picture for pair in zip(narrow, wide, strict=True) for picture in pair]
        length = backend.sequence_length(backend.pixel_config.visual_tokens(*wide[0].shape[-2:]), False)
        for deterministic in (False, True):
            scorer = QualityScorer(backend=backend, batch_tokens=length * 64, deterministic=deterministic)
            together = scorer.distributions(pictures).mean
            backwards = scorer.distributions(pictures[::-1]).mean.flip(0)
            alone = torch.cat([scorer.distributions(picture).mean for picture in pictures[::8]])
            lane = f"{' and '.join(BATCH_MATES)} tensor, {dtype}{', deterministic' if deterministic else ''}"
            yield lane, "alone and in a batch of 64", float((together[::8] - alone).abs().max()), "score"
            yield lane, "at another position", float((together - backwards).abs().max()), "score"


if __name__ == "__main__":
    main()
