"""A fast training forward of nano's vision tower over the weights of the Hugging Face module itself.

The library's forward loops over attention windows in Python, picture by picture. A training batch holds crops of one
size whose windows are all equal, so that one batched attention call per block does; `tests/nano` holds the two equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH

WINDOW = 128
"""Side of an attention window in pixels; training crops are multiples of it."""

ROPE_BASE = 10000.0
"""Base of the rotary positions in the vision towers of Qwen2-VL and later."""


def to_patches(images: Tensor, mean: float = IMAGE_MEAN) -> Tensor:
    """uint8 pictures (B, 3, S, S), S a multiple of 128, to normalised patches (B, N, 768) in window order."""
    batch, channels, size, _ = images.shape
    windows, units = size // WINDOW, WINDOW // (PATCH * MERGE)
    x = images.float().mul(1 / (255 * IMAGE_STD)).sub(mean / IMAGE_STD)
    x = x.view(batch, channels, windows, units, MERGE, PATCH, windows, units, MERGE, PATCH)
    x = x.permute(0, 2, 6, 3, 7, 4, 8, 1, 5, 9)  # window row, column; unit row, column; patch row, column; pixels
    return x.reshape(batch, -1, channels * PATCH * PATCH)


def _grid_order(size: int) -> Tensor:
    """Indices of the visual tokens, rows of the picture first, into window order (a permutation)."""
    windows, units = size // WINDOW, WINDOW // (PATCH * MERGE)
    side = windows * units
    grid = torch.arange(side * side).view(windows, units, windows, units).permute(0, 2, 1, 3)
    return grid.reshape(-1)


def _positions(size: int) -> Tensor:
    """Row and column of every patch in window order: (N, 2)."""
    windows, units = size // WINDOW, WINDOW // (PATCH * MERGE)
    side = size // PATCH
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack([rows, columns]).view(2, windows, units, MERGE, windows, units, MERGE)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(2, -1).T


def _rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class FastTower(nn.Module):
    """Batched forward over the parameters of a Hugging Face Qwen2.5-VL vision tower.

    `forward(images)`: uint8 (B, 3, S, S) to visual tokens (B, (S / 32)^2, out_hidden_size), rows of the picture first.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.heads = visual.config.num_heads
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _table(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        if size not in self._tables:
            patches = _positions(size)
            quarter = self.visual.config.hidden_size // self.heads // 4
            frequencies = ROPE_BASE ** -(torch.arange(quarter) / quarter)
            angles = (patches[..., None] * frequencies).flatten(1).repeat(1, 2)  # rows, columns, rows, columns
            self._tables[size] = (angles.cos(), angles.sin(), torch.argsort(_grid_order(size)))
        return self._tables[size]

    def _attention(self, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, count, width = x.shape
        length = (WINDOW // PATCH) ** 2  # every window is a sequence of its own
        cos, sin = (t.view(1, -1, 1, length, t.shape[-1]) for t in (cos, sin))
        qkv = block.attn.qkv(x).view(batch, -1, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).transpose(1, 2)
        return block.attn.proj(out.reshape(batch, count, width))

    def patches(self, images: Tensor) -> Tensor:
        """The stream after the last block, patches in window order: (B, N, hidden_size)."""
        cos, sin, _ = self._table(images.shape[-1])
        visual = self.visual
        weight = visual.patch_embed.proj.weight
        with torch.autocast("cpu", enabled=False):  # half precision would round away faint noise
            x = F.linear(to_patches(images), weight.flatten(1))
        for block in visual.blocks:
            x = x + self._attention(block, _rms_norm(x, block.norm1), cos, sin)
            h = _rms_norm(x, block.norm2)
            x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
        return x

    def forward(self, images: Tensor) -> Tensor:
        merger = self.visual.merger
        x = _rms_norm(self.patches(images), merger.ln_q).view(len(images), -1, merger.hidden_size)
        return merger.mlp(x)[:, self._table(images.shape[-1])[2]]
