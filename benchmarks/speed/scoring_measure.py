"""Memory, stages, start-up, and what a figure was measured on."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.speed.scoring_floor import synchronise
from benchmarks.speed.scoring_pictures import make_pictures
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.images import load_image
from vqr1_metric.scorer import QualityScorer

COLUMNS = (
    "date",
    "commit",
    "machine",
    "versions",
    "model",
    "revision",
    "device",
    "dtype",
    "threads",
    "lane",
    "measure",
    "value",
    "unit",
    "command",
)


class PeakMemory:
    """The most memory held inside a ``with`` block beyond what was held at its start: of the GPU, or of the process."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def __enter__(self) -> PeakMemory:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._highest = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._highest = max(self._highest, _resident())

    def so_far(self) -> float:
        """MiB."""
        highest = torch.cuda.max_memory_allocated() if self.on_gpu else self._highest
        return (highest - self._before) / 2**20

    def __exit__(self, *error) -> None:
        if not self.on_gpu:
            self._stop.set()
            self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def time_by_stage(scorer: QualityScorer, images: list, device: str) -> dict[str, float]:
    """Share of each stage, one after the other (scoring itself decodes files ahead, beside the model)."""
    seconds = dict.fromkeys(("decoding", "preprocessing", "vision tower", "language model", "readout"), 0.0)

    def timed(stage: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            synchronise(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(device)
            seconds[stage] += time.perf_counter() - start
            return result

        return call

    from vqr1_metric.backends import transformers as module

    model = scorer.backend.model.model
    begun = time.perf_counter()
    pixels = [timed("decoding", load_image)(image) for image in images]
    with ExitStack() as patches:
        for stage, holder, name in (
            ("preprocessing", module, "to_patches"),
            ("readout", module, "read_distribution"),
            ("vision tower", model.visual, "forward"),
            ("language model", model.language_model, "forward"),
        ):
            patches.enter_context(patch.object(holder, name, timed(stage, getattr(holder, name))))
        scorer.score(pixels)
    total = time.perf_counter() - begun
    return {stage: value / total for stage, value in seconds.items()} | {
        "everything else": 1 - sum(seconds.values()) / total
    }


def start_up(model: str, device: str, repeats: int) -> Iterator[tuple[str, str, float, str]]:
    """Fresh processes: an import, the help text, one picture."""
    timed = "import time; t = time.perf_counter(); import vqr1_metric; print(time.perf_counter() - t)"
    seconds = [float(_run([sys.executable, "-c", timed])) for _ in range(repeats)]
    yield "start", "import vqr1_metric", statistics.median(seconds), "s"
    vqr1 = [sys.executable, "-m", "vqr1_metric.cli"]
    with tempfile.TemporaryDirectory() as folder:
        (picture,) = make_pictures("512", 1, "file", "cpu", Path(folder))
        score = [*vqr1, "score", str(picture), "--model", model, "--device", device, "--silent"]
        for name, command in (("vqr1 --help", [*vqr1, "--help"]), ("vqr1 score, one picture, cold", score)):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                _run(command)
                seconds.append(time.perf_counter() - start)
            yield "start", name, statistics.median(seconds), "s"


def about_this_run(backend: TransformersBackend, device: str) -> dict[str, object]:
    """Where, when and with what the figures were measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    command = shlex.join(["python", "-m", "benchmarks.speed.scoring", *sys.argv[1:]])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name(),
        "versions": f"python {platform.python_version()}, {packages}",
        "model": backend.model_id,
        "revision": backend.revision,
        "device": device,
        "dtype": str(backend.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "command": command,
    }


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    try:
        return _run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _run(command: list[str]) -> str:
    """Standard output of a program that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def processor_name() -> str:
    """The processor's name, with the numbers that tell its generation, and how many cores this process sees."""
    try:
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        stated = {name.strip(): value.strip() for name, _, value in lines}
        name = f"{stated['model name']} (family {stated['cpu family']}, model {stated['model']})"
    except (OSError, KeyError):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
