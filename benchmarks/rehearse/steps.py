"""The steps of a rehearsal; ``python -m benchmarks.rehearse.steps STEP FOLDER DEVICE`` runs one and prints JSON."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.speed.scoring_pictures import make_pictures
from vqr1_metric.scorer import QualityScorer

#: Tokens of a reply in the step that writes one: random weights never end it, and a token of a 7B takes long on a CPU.
REPLY_TOKENS = 8
RATED = 5
LORA_RANK = 16
_ADAPTER = "adapter"


def peak_gib() -> float:
    """Largest resident memory of this process so far; of a mapped file what was read counts."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def load(folder: Path, device: str) -> tuple[float, str]:
    seconds, scorer = timed(lambda: loaded(folder, device))
    return seconds, str(scorer.backend.model.dtype).removeprefix("torch.")


def first_score(folder: Path, device: str) -> tuple[float, str]:
    scorer = loaded(folder, device)
    return timed(lambda: scorer.score(images("224", 1, device)))[0], "224x224, and what is found out once"


def score_224(folder: Path, device: str) -> tuple[float, str]:
    return second_score(folder, device, "224")


def score_512(folder: Path, device: str) -> tuple[float, str]:
    return second_score(folder, device, "512")


def second_score(folder: Path, device: str, size: str) -> tuple[float, str]:
    scorer = loaded(folder, device)
    scorer.score(images("224", 1, device))
    pixels = images(size, 1, device)
    return timed(lambda: scorer.score(pixels))[0], f"{size}x{size}, a later image"


def explain(folder: Path, device: str) -> tuple[float, str]:
    scorer = loaded(folder, device, num_samples=1, max_new_tokens=REPLY_TOKENS)
    pixels = images("224", 1, device)[0]
    return timed(lambda: scorer.explain(pixels))[0], f"224x224, a reply of {REPLY_TOKENS} tokens and the score after it"


def compare(folder: Path, device: str) -> tuple[float, str]:
    scorer = loaded(folder, device)
    pixels = images("224", 2, device)
    return timed(lambda: scorer.compare(*pixels))[0], "two of 224x224"


def evaluate(folder: Path, device: str) -> tuple[float, str]:
    from vqr1_metric.cli import main

    with tempfile.TemporaryDirectory() as work:
        files = make_pictures("224", RATED, "file", "cpu", Path(work))
        labels = Path(work, "labels.csv")
        with labels.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "mos"), *((Path(f).name, i) for i, f in enumerate(files))])
        command = ["evaluate", "--labels", str(labels), "--images", work, "--model", str(folder), "--device", device]
        seconds, code = timed(lambda: main([*command, "-o", str(Path(work, "results")), "--silent"]))
        if code:
            raise RuntimeError(f"vqr1 evaluate ended with {code}")
    return seconds, f"{RATED} rated images of 224x224, with loading"


def export_lora(folder: Path, device: str) -> tuple[float, str]:
    """An adapter of random weights over every linear layer of the language model, as ``vqr1 train`` writes one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    def export() -> None:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        settings = LoraConfig(
            r=LORA_RANK,
            target_modules="all-linear",
            exclude_modules=r".*\bvisual\b.*",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(model, settings).save_pretrained(folder / _ADAPTER)

    return timed(export)[0], f"rank {LORA_RANK}, with loading"


def score_with_lora(folder: Path, device: str) -> tuple[float, str]:
    if not (folder / _ADAPTER).is_dir():
        export_lora(folder, device)
    pixels = images("224", 1, device)
    return timed(lambda: loaded(folder / _ADAPTER, device).score(pixels))[0], "224x224, with loading and merging"


def save(folder: Path, device: str) -> tuple[float, str]:
    """The model written again, as after training, into a folder that is removed."""
    scorer, target = loaded(folder, device), folder / "saved"
    try:
        seconds, _ = timed(lambda: scorer.backend.model.save_pretrained(target))
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return seconds, f"{size / (1 << 30):.1f} GiB"


STEPS: dict[str, Callable[[Path, str], tuple[float, str]]] = {
    step.__name__: step
    for step in (
        *(load, first_score, score_224, score_512, explain, compare, evaluate, export_lora, score_with_lora, save),
    )
}


def loaded(folder: Path, device: str, **settings: int) -> QualityScorer:
    scorer = QualityScorer(str(folder), device=device, dtype="bfloat16", **settings)
    _ = scorer.backend
    return scorer


def images(size: str, count: int, device: str) -> list[torch.Tensor]:
    return make_pictures(size, count, "tensor", device, Path())


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    value = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*of the model's answers")
    name, where, on = sys.argv[1:]
    took, remark = STEPS[name](Path(where), on)
    print(json.dumps({"step": name, "seconds": took, "peak_gib": peak_gib(), "note": remark}))
