"""Everything that is to be known of one GPU, in one command and eight minutes; the most wanted figures first.

    python -m benchmarks.gpu -o gpu.csv                       7B shapes, random bfloat16 weights built on the card
    python -m benchmarks.gpu -o gpu.csv --write docs/speed.md    the page's table from the rows as well
    python -m benchmarks.gpu --rehearse -o rows.csv           the same code on the CPU with a thin model: seconds

A part that fails leaves a row with the reason and the next one runs; a part that would begin after the time is up is
left out, and a row says so. Speeds are medians over repeats; the floor of a lane is its operations over the measured
rate of matrix products, or the bytes of the weights over the measured bandwidth, whichever is longer.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.speed.scoring_authors import authors_scores
from benchmarks.speed.scoring_floor import matmul_rate, memory_bandwidth, operations, synchronise, weight_bytes
from benchmarks.speed.scoring_measure import COLUMNS, PeakMemory, about_this_run
from benchmarks.speed.scoring_models import make_backend, packed_prompts, stock_tower
from benchmarks.speed.scoring_pictures import make_pictures
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.scorer import QualityScorer

Row = tuple[str, str, float | str, str]  # lane, measure, value, unit
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"
LORA_RANK, IMAGES_OF_A_STEP = 64, 8


@dataclass
class Bench:
    """What every part needs."""

    model: str
    device: str
    repeats: int
    sizes: list[str]
    batches: list[int]
    backend: TransformersBackend
    rates: dict[str, float] = field(default_factory=dict)

    def images(self, size: str, count: int) -> list[torch.Tensor]:
        return make_pictures(size, count, "tensor", self.device, Path())

    def seconds(self, work: Callable[[], object]) -> float:
        """Median over the repeats, after a run that warms up."""
        times = []
        for repeat in range(self.repeats + 1):
            synchronise(self.device)
            start = time.perf_counter()
            work()
            synchronise(self.device)
            if repeat:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def speed(self, lane: str, images: list[torch.Tensor], work: Callable[[], object]) -> Iterator[Row]:
        with PeakMemory(self.device) as peak:
            seconds = self.seconds(work)
        yield lane, "speed", len(images) / seconds, "images/s"
        yield lane, "peak memory beyond the weights", peak.so_far(), "MiB"
        if self.rates:
            config = self.backend.pixel_config
            grids = [
                tuple(side // config.patch_size for side in config.target_size(*image.shape[-2:])) for image in images
            ]
            by_rate = operations(self.backend, grids) / self.rates["matrix products"]
            floor = max(by_rate, weight_bytes(self.backend) / self.rates["memory bandwidth"])
            yield lane, "speed of the floor", len(images) / floor, "images/s"


def machine(bench: Bench) -> Iterator[Row]:
    bench.rates["matrix products"] = matmul_rate(bench.device, bench.backend.model.dtype)
    bench.rates["memory bandwidth"] = memory_bandwidth(bench.device)
    yield "machine", "matrix products", bench.rates["matrix products"], "operations/s"
    yield "machine", "memory bandwidth", bench.rates["memory bandwidth"], "bytes/s"


def scorer_of(bench: Bench, images: list[torch.Tensor], deterministic: bool = False) -> QualityScorer:
    config = bench.backend.pixel_config
    tokens = max(bench.backend.sequence_length(config.visual_tokens(*i.shape[-2:]), False) for i in images)
    return QualityScorer(backend=bench.backend, batch_tokens=tokens * len(images), deterministic=deterministic)


def one_pass(bench: Bench) -> Iterator[Row]:
    for size in bench.sizes:
        for batch in bench.batches:
            images = bench.images(size, batch)
            scorer = scorer_of(bench, images)
            yield from bench.speed(f"one pass, {size}, batch {batch}", images, lambda s=scorer, i=images: s.score(i))


def authors(bench: Bench) -> Iterator[Row]:
    limit = bench.backend.pixel_config.max_pixels
    for size in bench.sizes:
        images = bench.images(size, max(bench.batches[-1], 2) // 2)
        work = lambda i=images: list(authors_scores(bench.backend, i, limit))  # noqa: E731
        yield from bench.speed(f"authors' procedure, fused tower, {size}", images, work)
        with stock_tower(bench.backend.model):
            yield from bench.speed(f"authors' procedure, {size}", images, work)


def packed(bench: Bench) -> Iterator[Row]:
    images = bench.images("mixed", 8)
    scorer = scorer_of(bench, images)
    yield from bench.speed("one pass, mixed sizes, batch 8", images, lambda: scorer.score(images))
    with packed_prompts(bench.backend.model):
        yield from bench.speed("one pass, mixed sizes, packed", images, lambda: scorer.score(images))


def compiled(bench: Bench) -> Iterator[Row]:
    images = bench.images(bench.sizes[0], 8)
    scorer, language = scorer_of(bench, images), bench.backend.model.model.language_model
    eager = [layer.forward for layer in language.layers]
    try:
        for layer in language.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        start = time.perf_counter()
        scorer.score(images)
        yield "one pass, compiled layers", "first call", time.perf_counter() - start, "s"
        yield from bench.speed(
            f"one pass, {bench.sizes[0]}, batch 8, compiled layers", images, lambda: scorer.score(images)
        )
    finally:
        for layer, forward in zip(language.layers, eager, strict=True):
            layer.forward = forward


def batch_invariance(bench: Bench) -> Iterator[Row]:
    """Largest difference of an image's score alone and in a batch with images of another size."""
    first, second = bench.sizes[:2]
    images = [image for pair in zip(bench.images(first, 4), bench.images(second, 4), strict=True) for image in pair]
    for deterministic in (False, True):
        scorer = scorer_of(bench, images, deterministic)
        together = scorer.distributions(images).mean
        alone = torch.cat([scorer.distributions(image).mean for image in images])
        lane = f"{first} and {second} in a batch of 8{', deterministic' if deterministic else ''}"
        yield lane, "largest difference from alone", float((together - alone).abs().max()), "score"


def offload(bench: Bench) -> Iterator[Row]:
    for name, work in (("offload", bench.backend.offload), ("reload", bench.backend.to_own_device)):
        synchronise(bench.device)
        start = time.perf_counter()
        work()
        synchronise(bench.device)
        yield name, "seconds", time.perf_counter() - start, "s"


def differentiable(bench: Bench) -> Iterator[Row]:
    images = torch.stack(bench.images(bench.sizes[0], 1)).float().div(255).requires_grad_()

    def work() -> None:
        QualityScorer(backend=bench.backend).distributions(images, differentiable=True).mean.sum().backward()

    yield from bench.speed(f"differentiable pass and its gradient, {bench.sizes[0]}", [images[0]], work)


def rl2r_step(bench: Bench) -> Iterator[Row]:
    """One step of exact RL2R over LoRA adapters: 8 images, gradient checkpointing, AdamW."""
    from peft import LoraConfig, get_peft_model

    from vqr1_metric.functional.reward import ranking_reward

    backend, images = bench.backend, bench.images(bench.sizes[0], IMAGES_OF_A_STEP)
    mos = torch.linspace(1, 5, len(images), device=bench.device)
    settings = LoraConfig(r=LORA_RANK, target_modules="all-linear", exclude_modules=r".*\bvisual\b.*")
    adapted = get_peft_model(backend.model, settings)
    try:
        backend.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backend.model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-6)

        def step() -> None:
            with torch.enable_grad():
                distribution = backend.distributions(images, backend.pixel_config)
                means = distribution.mean[:, None]
                spread = distribution.std[:, None]
                reward = ranking_reward(torch.cat([means - spread, means + spread], dim=1), mos).mean()
            (-reward).backward()
            optimizer.step()
            optimizer.zero_grad()

        yield from bench.speed(f"RL2R step, LoRA {LORA_RANK}, {len(images)} images", images, step)
    finally:
        backend.model.gradient_checkpointing_disable()
        backend.model = adapted.unload()


def eight_bits(bench: Bench) -> Iterator[Row]:
    """The language model's layers in int8 (bitsandbytes); the model is not given back."""
    from bitsandbytes.nn import Linear8bitLt

    language = bench.backend.model.model.language_model
    for module in list(language.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                small = Linear8bitLt(
                    child.in_features, child.out_features, bias=child.bias is not None, has_fp16_weights=False
                )
                small.load_state_dict(child.state_dict())
                setattr(module, name, small.to(bench.device))
    images = bench.images(bench.sizes[0], 8)
    scorer = scorer_of(bench, images)
    yield from bench.speed(f"one pass, {bench.sizes[0]}, batch 8, int8", images, lambda: scorer.score(images))


def device_map(bench: Bench) -> Iterator[Row]:
    """Half the model on the card, half on the CPU; the last part, as the model is not given back."""
    from accelerate import dispatch_model, infer_auto_device_map

    model = bench.backend.model
    room: dict[int | str, int] = {"cpu": 1 << 62}
    if bench.device == "cuda":
        room[0] = weight_bytes(bench.backend) // 2
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    dispatch_model(model, places, main_device=bench.device, offload_buffers=True)
    images = bench.images(bench.sizes[0], 1)
    yield from bench.speed(
        "half of the layers on the CPU, batch 1", images, lambda: QualityScorer(backend=bench.backend).score(images)
    )


def tests(bench: Bench) -> Iterator[Row]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider"],
        env=os.environ | {"VQR1_TEST_GPU": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    yield "gpu tests", "result", (done.stdout.splitlines() or ["nothing printed"])[-1], ""


PARTS = (machine, one_pass, authors, batch_invariance, offload, differentiable, packed, rl2r_step, tests, compiled)
#: These change the model for good.
LAST = (eight_bits, device_map)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run every part and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="put the table into this page")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in (*PARTS, *LAST)])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a thin model")
    args = parser.parse_args(arguments)
    begun = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*of the model's answers")
    if args.rehearse:
        model, device, dtype, repeats, sizes, batches = "tiny", "cpu", "float32", 1, ["112", "140x112"], [1, 2]
    else:
        model, device, dtype, repeats = "7b", "cuda", "bfloat16", 3
        sizes, batches = ["512", "1024x768"], [1, 8, 64]
    bench = Bench(model, device, repeats, sizes, batches, make_backend(model, device, dtype))
    facts = about_this_run(bench.backend, device)
    rows: list[Row] = [("start", "model built", time.perf_counter() - begun, "s")]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for part in (*PARTS, *LAST):
            if args.parts and part.__name__ not in args.parts:
                continue
            for row in attempt(part, bench, begun + 60 * args.minutes):
                rows.append(row)
                lane, measure, value, unit = row
                shown = value if isinstance(value, str) else f"{value:.4g}"
                writer.writerow({**facts, "lane": lane, "measure": measure, "value": shown, "unit": unit})
                file.flush()  # what is measured stays, whatever happens to the card
                print(f"{time.perf_counter() - begun:6.0f} s  {lane}: {measure} {shown} {unit}", flush=True)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        args.write.write_text(f"{before}{BEGIN}\n{table(rows, facts)}{END}{after}", encoding="utf-8")
    return rows


def attempt(part: Callable[[Bench], Iterator[Row]], bench: Bench, end: float) -> Iterator[Row]:
    """The part's rows; a reason where it fails or comes too late."""
    if time.perf_counter() > end:
        yield part.__name__, "left out", "the time was up", ""
        return
    try:
        with torch.inference_mode(False):
            yield from part(bench)
    except Exception as error:  # whatever it is: the card is lent, the other parts are to run
        yield part.__name__, "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200], ""
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def table(rows: list[Row], facts: dict[str, object]) -> str:
    """Lanes with a speed, beside their floor and memory, as markdown; then what failed or was left out."""
    lanes: dict[str, dict[str, float | str]] = {}
    for lane, measure, value, _ in rows:
        lanes.setdefault(lane, {})[measure] = value
    lines = [f"{facts['machine']}, {facts['versions']}, commit {facts['commit']}, {facts['date']}", ""]
    lines += ["| lane | images/s | floor, images/s | of the floor | peak memory, MiB |", "|---|---|---|---|---|"]
    for lane, found in lanes.items():
        if "speed" in found:
            speed, floor = float(found["speed"]), float(found.get("speed of the floor", "nan"))
            memory = float(found["peak memory beyond the weights"])
            lines.append(f"| {lane} | {speed:.3g} | {floor:.3g} | {speed / floor:.0%} | {memory:.0f} |")
    notes = [
        f"- {lane}: {m} ({v})" for lane, found in lanes.items() for m, v in found.items() if m in ("failed", "left out")
    ]
    return "\n".join([*lines, "", *notes, ""])


if __name__ == "__main__":
    main()
