"""Classical no-reference quality features in plain torch, batched.

They serve as dense targets beside the opinion scores, and as the inputs of the teacher (`teacher.py`): a few thousand
opinions teach a network from scratch slowly, while every crop of every picture, distorted or not, has an exact feature
vector. The families are those of BRISQUE (moments of mean-subtracted contrast-normalised luminance, Mittal et al.
2012), the variance of the Laplacian, gradient statistics, 8x8 block artefacts, colour statistics (colourfulness after
Hasler and Suesstrunk 2003), and the sizes of the cosine coefficients of 16x16 patches.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .start import CHROMA, LUMA, PATCH, dct_basis, usual_size
from .tower import to_patches

CLASSICAL, STATISTICS = 119, 119 + 3 * 256
"""Lengths of the vectors of `classical_features` and `statistics`."""

_EPS = 1e-5


@functools.cache
def _blur_matrix(size: int, sigma: float = 7 / 6, radius: int = 3) -> Tensor:
    """(size, size) matrix of a Gaussian blur with replicated borders; faster than a one-channel convolution."""
    taps = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    matrix = torch.zeros(size, size)
    for offset, tap in zip(range(-radius, radius + 1), taps / taps.sum(), strict=True):
        source = (torch.arange(size) + offset).clamp(0, size - 1)
        matrix[source, torch.arange(size)] += tap
    return matrix


def _gaussian_blur(x: Tensor) -> Tensor:
    return _blur_matrix(x.shape[-2]).T @ x @ _blur_matrix(x.shape[-1])


def _log_mean(x: Tensor) -> Tensor:
    return torch.log(x.mean(dim=(1, 2, 3)) + _EPS)


def _mscn_moments(x: Tensor) -> list[Tensor]:
    """Log moments of a zero-mean field: spread, peakedness, asymmetry. They carry what an AGGD fit would return."""
    magnitude, square = x.abs().mean(dim=(1, 2, 3)), (x * x).mean(dim=(1, 2, 3))
    left = (x.clamp(max=0) ** 2).mean(dim=(1, 2, 3))
    right = (x.clamp(min=0) ** 2).mean(dim=(1, 2, 3))
    return [
        torch.log(square + _EPS),
        magnitude**2 / (square + _EPS),
        torch.log(left + _EPS) - torch.log(right + _EPS),
    ]


def _scale_features(luma: Tensor) -> list[Tensor]:
    mean = _gaussian_blur(luma)
    deviation = (_gaussian_blur(luma * luma) - mean * mean).clamp(min=0).sqrt()
    mscn = (luma - mean) / (deviation + 1 / 255)
    out = _mscn_moments(mscn)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        out += _mscn_moments(mscn * torch.roll(mscn, (dy, dx), dims=(2, 3)))
    laplacian = luma[..., 1:-1, 2:] + luma[..., 1:-1, :-2] + luma[..., 2:, 1:-1] + luma[..., :-2, 1:-1]
    laplacian = laplacian - 4 * luma[..., 1:-1, 1:-1]
    gx, gy = luma[..., :, 1:] - luma[..., :, :-1], luma[..., 1:, :] - luma[..., :-1, :]
    out += [_log_mean(laplacian**2), _log_mean(laplacian.abs()), _log_mean(gx**2), _log_mean(gy**2)]
    out += [_log_mean(gx.abs()), _log_mean(gy.abs())]
    # How sharpness is spread over the picture: quantiles over cells of 16 pixels (a sharp subject on soft ground).
    cells = torch.log(F.avg_pool2d(laplacian**2, 16) + _EPS).flatten(1)
    out += list(torch.quantile(cells, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=1))
    contrast = torch.log(F.avg_pool2d(deviation, 16) + 1e-3).flatten(1)
    out += list(torch.quantile(contrast, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=1))
    height, width = luma.shape[-2:]
    centre = laplacian[..., height // 4 : -height // 4, width // 4 : -width // 4]
    out.append(_log_mean(centre**2))
    return out


def _blockiness(luma: Tensor) -> list[Tensor]:
    """Steps across the lines of an 8-pixel grid beside all steps, at the best of the 8 offsets, in both directions."""
    out = []
    for step in ((luma[..., :, 1:] - luma[..., :, :-1]).abs(), (luma[..., 1:, :] - luma[..., :-1, :]).abs().mT):
        profile = step.mean(dim=(1, 2))
        usable = profile.shape[1] // 8 * 8
        phase = profile[:, :usable].unflatten(1, (-1, 8)).mean(1)
        out.append(torch.log(phase.amax(1) + 1e-4) - torch.log(phase.median(1).values + 1e-4))
    return out


def _colour(images: Tensor, luma: Tensor) -> list[Tensor]:
    red, green, blue = images.unbind(1)
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread = (rg.var(dim=(1, 2)) + yb.var(dim=(1, 2))).sqrt()
    shift = (rg.mean(dim=(1, 2)) ** 2 + yb.mean(dim=(1, 2)) ** 2).sqrt()
    highest, lowest = images.amax(1), images.amin(1)
    saturation = (highest - lowest) / (highest + 0.05)
    flat = luma.flatten(1)
    out = [spread, shift, spread + 0.3 * shift, saturation.mean(dim=(1, 2)), saturation.std(dim=(1, 2))]
    out += [rg.mean(dim=(1, 2)), yb.mean(dim=(1, 2)), flat.mean(1), flat.std(1)]
    out += list(torch.quantile(flat[:, ::7], torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]), dim=1))
    out += [(flat > 0.98).float().mean(1), (flat < 0.02).float().mean(1)]
    histogram = torch.stack([torch.histc(row, 64, 0, 1) for row in flat]) / flat.shape[1]
    out.append(-(histogram * torch.log(histogram + 1e-9)).sum(1))
    # Colour noise: fine detail in the chroma, beside that of the luminance.
    out += [_log_mean((x[:, 1:, 1:] - x[:, :-1, :-1]).unsqueeze(1) ** 2) for x in (rg, yb)]
    return out


@torch.no_grad()
def classical_features(images: Tensor) -> Tensor:
    """Features of pictures `images` (B, 3, H, W), uint8 or float in [0, 1]: a float tensor (B, 119), unstandardised."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    luma = (images * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    out = _blockiness(luma) + _colour(images, luma)
    for scale in range(3):
        out += _scale_features(luma if scale == 0 else F.avg_pool2d(luma, 2**scale))
    return torch.stack(out, dim=1)


@functools.cache
def _coefficients(count: int = 256, seed: int = 0) -> Tensor:
    """Filters (count, 768) of the coefficients: luminance and chroma, coarse to fine; the finest share the last 24."""
    basis, radius = dct_basis(PATCH)
    luma, chroma = torch.tensor(LUMA, dtype=torch.float64), torch.tensor(CHROMA, dtype=torch.float64)

    def weigh(plane: Tensor, channels: Tensor) -> Tensor:
        return (plane[None] * channels[:, None, None]).flatten()

    scale = [usual_size(float(r)) for r in radius]
    rows = [weigh(basis[0] * 0.25, luma), *(weigh(basis[0], c) for c in chroma)]
    rows += [weigh(basis[i] * scale[i] * 3, c) for c in chroma for i in range(1, 15)]
    kept = count - len(rows) - 24
    rows += [weigh(basis[i] * scale[i], luma) for i in range(1, kept + 1)]
    generator = torch.Generator().manual_seed(seed)
    rest = range(kept + 1, PATCH * PATCH)
    for _ in range(24):
        signs = torch.randint(0, 2, (len(rest),), generator=generator).double() * 2 - 1
        mixed = sum(s * basis[i] * scale[i] for s, i in zip(signs, rest, strict=True)) / len(rest) ** 0.5
        rows.append(weigh(mixed, luma))
    return torch.stack(rows).float()


@torch.no_grad()
def patch_statistics(images: Tensor) -> Tensor:
    """Size of each cosine coefficient of 16x16 patches over a picture: log of the mean, mean of the log, log of the
    mean square. uint8 (B, 3, S, S), S a multiple of 128, to (B, 768). The three differ where detail is uneven."""
    size = F.linear(to_patches(images, mean=-1.0), _coefficients()).abs()  # mean -1: black is not zero
    mean, square = size.mean(1).clamp(min=1e-3).log(), size.square().mean(1).clamp(min=1e-5).log()
    return torch.cat([mean, (size + 0.03).log().mean(1), square], dim=1)


def statistics(images: Tensor) -> Tensor:
    """All of the above of uint8 pictures (B, 3, S, S): (B, 887)."""
    return torch.cat([classical_features(images), patch_statistics(images)], dim=1)
