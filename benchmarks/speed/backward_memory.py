"""Peak memory of the differentiable score beside the plain one, forward and backward, by picture size.

    python benchmarks/speed/backward_memory.py [--model nano] [--device cpu] [--sizes 224 384] [--batches 1 4]

Counts what torch allocates on top of the weights: on the CPU the profiler's record of every allocation, on a GPU
`torch.cuda.max_memory_allocated`. Prints CSV.
"""

import argparse
import sys
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from vqr1_metric import QualityScorer, visual_quality_r1_score

MIB = 1 << 20


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes held at once by tensors that were allocated during the call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    """Print one row per size and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # Sizes above the model's own limit are what is measured here, so lift it.
    scorer = QualityScorer(
        options.model, device=options.device, dtype=options.dtype, max_pixels=max(options.sizes) ** 2 * 2
    )
    weights = sum(p.nbytes for p in scorer.backend.model.parameters())
    print(f"# {options.model} on {options.device}, weights {weights / MIB:.1f} MiB", file=sys.stderr)
    print("size,batch,visual_tokens,plain_MiB,differentiable_MiB,ratio")
    for size in options.sizes:
        for batch in options.batches:
            images = torch.rand(batch, 3, size, size, device=options.device)

            def plain(images: torch.Tensor = images) -> None:
                visual_quality_r1_score(images, scorer)

            def backward(images: torch.Tensor = images) -> None:
                pixels = images.clone().requires_grad_()
                visual_quality_r1_score(pixels, scorer, differentiable=True).backward()

            plain()  # loads, calibrates, warms up
            low, high = (peak_bytes(call, options.device) / MIB for call in (plain, backward))
            tokens = batch * scorer.pixel_config.visual_tokens(size, size)
            print(f"{size},{batch},{tokens},{low:.1f},{high:.1f},{high / low:.1f}", flush=True)


if __name__ == "__main__":
    main()
