"""The least time scoring can take here: operations over the measured rate, bytes over the measured bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from vqr1_metric.backends.cpu import fast_products
from vqr1_metric.backends.transformers import TransformersBackend


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second in matrix products: the best of some shapes."""
    sizes = [(8192, 8192, 8192), (16384, 3584, 18944)] if device != "cpu" else [(2048, 256, 1024), (1024, 1024, 1024)]
    rates = []
    with fast_products(), torch.inference_mode():
        for rows, inner, columns in sizes:
            x, w = torch.randn(rows, inner, device=device), torch.randn(columns, inner, device=device)
            x, w = x.to(dtype), w.to(dtype)
            seconds = best_seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w), device)
            rates.append(2 * rows * inner * columns / seconds)
    return max(rates)


def memory_bandwidth(device: str) -> float:
    """Bytes a second, read and written, in copying."""
    source = torch.empty((1 << 30) if device != "cpu" else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * len(source) / best_seconds(lambda: target.copy_(source), device)


def best_seconds(run: Callable[[], object], device: str, repeats: int = 10) -> float:
    """The shortest of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def operations(backend: TransformersBackend, grids: Sequence[tuple[int, int]]) -> float:
    """Multiplications and additions of the one-pass readout of pictures of these sizes in patches (rows, columns).

    Every weight is used once for each row that passes it; attention is what its visible pairs need.
    """
    model, config = backend.model, backend.model.config
    vision, text = config.vision_config, config.get_text_config()
    tower, language = model.model.visual, model.model.language_model
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    full = getattr(vision, "fullatt_block_indexes", None)
    whole_layers = vision.depth if full is None else len(full)
    window = 0 if full is None else (vision.window_size // vision.patch_size) ** 2
    nodes = len(backend.trie)
    total = 0.0
    for rows, columns in grids:
        patches = rows * columns
        tokens = patches // vision.spatial_merge_size**2
        length = backend.sequence_length(tokens, False)
        total += 2 * patches * (_matrices(tower.blocks) + _matrices(tower.patch_embed))
        total += 2 * tokens * _matrices(tower.merger)
        total += 4 * width * patches * (whole_layers * patches + (vision.depth - whole_layers) * min(window, patches))
        total += 2 * length * _matrices(language.layers)
        total += 4 * text.num_hidden_layers * text.hidden_size * length * length / 2
        total += 2 * (nodes + 1) * model.get_output_embeddings().weight.numel()
    return total


def weight_bytes(backend: TransformersBackend) -> int:
    """Bytes of weights that one forward pass reads."""
    return sum(p.numel() * p.element_size() for p in backend.model.parameters())


def _matrices(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)
