"""The tower's starting weights: statistics of cosine coefficients, written into the network by construction.

How good a picture looks follows well from how large its cosine coefficients are: kernel ridge regression on the means
of two clipped sizes of 124 coefficients reaches an SRCC of .70 on held-out pictures of BIQ2021. A tower started from
noise has to find this elementwise arithmetic among dense matrices and does not within hours; started with it, training
can spend itself on what is better than that. All weights stay free.

The stream has 256 places. 0..2: mean luminance and chroma of a patch, signed; 3..126: coefficients x, turned into
|x| by the first block and into the coarse clipped size by the second; 127..250: the fine clipped size; the last: a
constant, far larger than the rest, so that the norms (which divide by the root mean square) leave sizes as they are.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

PATCH = 16
SIGNED, SIZES = 3, 124
SINGLE = 39
"""Luminance coefficients with a place of their own; the finer ones share places in groups of two or three."""
CONSTANT = 16.0
"""Root mean square of the stream; the constant's place holds it times the root of the width."""
FINE, COARSE = (0.1, 0.4), (1.6, 6.4)
"""Sizes at which the two clipped sums saturate: min(|x| / a, 1) + min(|x| / b, 1)."""
SHARPNESS = 30.0
CHROMA = ((0.5, -0.5, 0.0), (-0.25, -0.25, 0.5))
LUMA = (0.299, 0.587, 0.114)


@functools.cache
def dct_basis(size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal 2-D DCT basis (size^2, size, size) from coarse to fine, and the radius of each frequency."""
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (n + 0.5)[None] * n[:, None] / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    flat = torch.einsum("ui,vj->uvij", basis, basis).reshape(size * size, size, size)
    radius = torch.hypot(n[:, None], n[None]).flatten()
    order = torch.argsort(radius, stable=True)
    return flat[order], radius[order]


def usual_size(radius: float) -> float:
    """What a coefficient is multiplied by to be about one in photographs, where it falls a little faster than 1 / f."""
    return 0.75 * radius**1.5


def filters(seed: int = 0) -> Tensor:
    """The coefficients' filters (SIGNED + SIZES, 3, 16, 16): luminance and chroma, coarse to fine."""
    basis, radius = dct_basis(PATCH)
    luma, chroma = torch.tensor(LUMA, dtype=torch.float64), torch.tensor(CHROMA, dtype=torch.float64)

    def weigh(plane: Tensor, channels: Tensor) -> Tensor:
        return plane[None] * channels[:, None, None]

    rows = [weigh(basis[0] * 0.25, luma), *(weigh(basis[0], c) for c in chroma)]  # signed
    rows += [weigh(basis[0], c) for c in chroma]
    rows += [weigh(basis[i] * usual_size(float(radius[i])) * 3, c) for c in chroma for i in range(1, 5)]
    groups = [[i] for i in range(1, SINGLE + 1)]
    shared = SIGNED + SIZES - len(rows) - len(groups)
    groups += [list(group) for group in np.array_split(np.arange(SINGLE + 1, PATCH * PATCH), shared)]
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        signs = torch.randint(0, 2, (len(group),), generator=generator).double() * 2 - 1
        mixed = sum(s * basis[i] * usual_size(float(radius[i])) for i, s in zip(group, signs, strict=True))
        rows.append(weigh(mixed / len(group) ** 0.5, luma))
    return torch.stack(rows)


def _unit(mlp: nn.Module, unit: int, place: int, slope: float, threshold: float, sharpness: float) -> None:
    """Hidden unit = silu(sharpness * (slope * x - threshold)) of one place: nearly sharpness * relu(...)."""
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[unit] = 0
    mlp.gate_proj.weight[unit, place] = sharpness * slope
    mlp.gate_proj.bias[unit] = -sharpness * threshold
    mlp.up_proj.bias[unit] = 1
    mlp.down_proj.weight[:, unit] = 0


def _sizes(mlp: nn.Module) -> None:
    """x + 2 relu(-x) = |x| for every coefficient."""
    for unit in range(SIZES):
        place = SIGNED + unit
        _unit(mlp, unit, place, -1.0, 0.0, SHARPNESS)
        mlp.down_proj.weight[place, unit] = 2 / SHARPNESS


def _clipped_sizes(mlp: nn.Module) -> None:
    """Fine sums into places of their own, coarse ones in place of the sizes."""
    for number in range(SIZES):
        size, fine = SIGNED + number, SIGNED + SIZES + number
        first = number * 5
        # min(a / t, 1) = a / t - relu(a - t) / t, and a itself is silu with a threshold far below every size.
        _unit(mlp, first, size, 1.0, -5.0, 2.0)
        for place, limits in ((fine, FINE), (size, COARSE)):
            mlp.down_proj.weight[place, first] = sum(1 / t for t in limits) / 2.0
            mlp.down_proj.bias[place] = -5 * sum(1 / t for t in limits)
        mlp.down_proj.weight[size, first] -= 1 / 2.0
        mlp.down_proj.bias[size] += 5
        for offset, (place, t) in enumerate([*((fine, t) for t in FINE), *((size, t) for t in COARSE)], 1):
            sharpness = max(2.0, 6 / t)
            _unit(mlp, first + offset, size, 1.0, t, sharpness)
            mlp.down_proj.weight[place, first + offset] = -1 / (t * sharpness)


@torch.no_grad()
def start_tower(visual: nn.Module, seed: int = 0) -> None:
    """Write the construction over a tower's random weights, which should be scaled by 1 / sqrt(inputs)."""
    width = visual.config.hidden_size
    for index, block in enumerate(visual.blocks):
        block.attn.proj.weight.mul_(0.02)
        block.mlp.down_proj.weight.mul_(0.02 if index < 2 else 0.1)
        for norm in (block.norm1, block.norm2):
            norm.weight.fill_(CONSTANT)
            norm.weight[-1] = 1.0
    weight = torch.zeros(width, 3, PATCH, PATCH, dtype=torch.float64)
    made = filters(seed)
    weight[: len(made)] = made
    visual.patch_embed.proj.weight.copy_(weight[:, :, None].float())
    first = visual.blocks[0]
    first.attn.proj.bias.zero_()
    first.attn.proj.bias[-1] = CONSTANT * width**0.5
    first.norm1.weight.fill_(1.0)  # there is no constant yet
    _sizes(first.mlp)
    _clipped_sizes(visual.blocks[1].mlp)
    visual.merger.ln_q.weight.fill_(CONSTANT)
    visual.merger.ln_q.weight[-1] = 1.0


@torch.no_grad()
def start_merger(visual: nn.Module, patches: Tensor) -> None:
    """Let the visual tokens be the principal directions of what the pictures' mean patches differ in.

    Args:
        visual: a tower after `start_tower`.
        patches: what the merger's norm returns for some pictures, averaged over each picture: (pictures, width).
    """
    merger, width = visual.merger, patches.shape[1]
    count = merger.mlp[2].out_features
    usable = patches.std(0) > 1e-4
    mean, std = patches.mean(0), patches.std(0).clamp(min=1e-4)
    standard = ((patches - mean) / std)[:, usable]
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    kept = min(count, int(usable.sum()))
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    directions = torch.zeros(kept, width)
    # Divided by the fourth root of the variance: between whitening, which lifts noise, and not.
    directions[:, usable] = (vectors / values.clamp(min=1e-3) ** 0.25).T
    directions = directions / std
    cells = merger.hidden_size // width
    for part, sign in enumerate((1.0, -1.0)):  # gelu(z) - gelu(-z) = z
        units = slice(part * kept, (part + 1) * kept)
        merger.mlp[0].weight[units] = sign * directions.repeat(1, cells) / cells
        merger.mlp[0].bias[units] = -sign * directions @ mean
        merger.mlp[2].weight[:, units] = 0
        merger.mlp[2].weight[:kept, units] = sign * torch.eye(kept)
    merger.mlp[2].weight[:, 2 * kept :] *= 0.1
    merger.mlp[2].bias.zero_()


@torch.no_grad()
def centre_tokens(visual: nn.Module, norm: nn.BatchNorm1d, spread: float = 0.3, constant: float = 16.0) -> None:
    """Fold the statistics of the pooled tokens into the merger, so that the language model sees what differs.

    The mean over pictures goes to zero and the usual spread of a place to `spread`. The last place, of the least
    principal direction, becomes a constant, for the sake of the norms, as in the tower.

    Args:
        visual: the tower.
        norm: of the pooled head, with statistics of the tokens; it is changed to match.
    """
    last = visual.merger.mlp[2]
    scale = spread / norm.running_var[:-1].mean().sqrt()
    last.weight *= scale
    last.bias.copy_((last.bias - norm.running_mean) * scale)
    last.weight[-1], last.bias[-1] = 0, constant
    norm.running_mean.zero_()
    norm.running_var.mul_(scale**2)
    norm.running_mean[-1], norm.running_var[-1], norm.weight[-1] = constant, 1, 0
