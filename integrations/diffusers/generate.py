"""What `vqr1 generate` does: the best of n for every prompt of a list, in a folder each, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from vqr1_metric.integrations.diffusers.best_of_n import BestOfN
from vqr1_metric.integrations.diffusers.records import replace
from vqr1_metric.integrations.diffusers.results import BestOfNOutput

_REQUEST = "request.json"


def load_pipe(name: str, device: str | None, dtype: str | None, offload: bool) -> Any:
    """A diffusers pipeline of a folder or the Hub.

    Args:
        name: folder, or name on the Hub.
        device: where it runs; the GPU if there is one.
        dtype: such as ``bfloat16``; bfloat16 on a GPU, float32 elsewhere.
        offload: keep its parts on the CPU while they are not in use.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=chosen)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def generate(
    best: BestOfN, prompts: Sequence[str], out: Path, **arguments: Any
) -> Iterator[tuple[str, Path, BestOfNOutput | None]]:
    """Make, score and save the best of n for every prompt, in ``out/0000``, ``out/0001`` and so on.

    Gives the prompt, its folder and its output; None for the output where the folder holds the same request already,
    finished. A prompt that was begun goes on with the candidates that it has. Ends after a run that was interrupted.

    Args:
        best: of a pipe or a function.
        prompts: one folder each, in this order.
        out: folder of folders.
        arguments: of the call of ``best``.

    Raises:
        ValueError: for a folder that holds another request's pictures.
    """
    for place, prompt in enumerate(prompts):
        folder = out / f"{place:04d}"
        request = json.dumps({"prompt": prompt, "scorer": best.scorer_identity()} | arguments, default=str, indent=1)
        note = folder / _REQUEST
        if note.exists() and note.read_text(encoding="utf-8") == request:
            yield prompt, folder, None
            continue
        output = best(prompt, folder=folder, **arguments)
        output.save(folder)
        if output.interrupted is None:
            replace(note, lambda path, text=request: path.write_text(text, encoding="utf-8"))
        yield prompt, folder, output
        if output.interrupted is not None:
            return
