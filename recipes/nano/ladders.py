"""Ladders: one picture at rising strengths of one fault, undistorted or enlarged before.

Beside the sixteen distortions of :mod:`vqr1_metric.images.distortions` there are the faults of enlargements: an
enlarged picture with noise, over-sharpening, ringing or JPEG on top. Nobody rated these; their order is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort, distort_by

PRISTINE, WORST = 4.4, 1.1
"""Assumed score of an undistorted picture, and at level 8 of a distortion that destroys detail."""
MILD = {"contrast": 0.6, "colour": 0.5, "darken": 0.7, "overexpose": 0.7, "colour_cast": 0.6, "posterise": 0.8}
"""Share of the fall for distortions that leave the detail in place."""
FAULTS = ("noise", "over_sharpening", "ringing", "jpeg")
"""Faults put on top of enlargements."""
_SHARPEN = (60, 100, 150, 220, 310, 430, 600, 900)  # percent of the difference from the blurred picture that is added
_RIPPLE = (0.5, 1.0, 1.6, 2.4, 3.4, 4.8, 6.6, 9.0)  # gain of the frequencies just below the cut


def assumed_score(start: float, name: str, level: float) -> float:
    """Straight down from the start to the worst score at level 8."""
    return start - MILD.get(name, 1.0) * (start - WORST) * level / LEVELS


def add_fault(picture: Image.Image, fault: str, level: int, seed: int = 0) -> Image.Image:
    """One of `FAULTS` at a level from 1 to 8 (0: none); everything drawn comes from the seed."""
    if level == 0:
        return picture
    rng = np.random.default_rng(seed)
    if fault == "noise":
        return distort(picture, ("noise", "grey_noise")[int(rng.integers(2))], level, seed)
    if fault == "jpeg":
        return distort(picture, "jpeg", level, seed)
    if fault == "over_sharpening":
        return picture.filter(ImageFilter.UnsharpMask(rng.uniform(0.8, 3.0), _SHARPEN[level - 1], 0))
    return _ringing(picture, _RIPPLE[level - 1], rng)


def _ringing(picture: Image.Image, gain: float, rng: np.random.Generator) -> Image.Image:
    """Ripples beside edges: a band of frequencies below a cut is raised, what lies above the cut is lost."""
    values = np.asarray(picture, np.float32)
    radius = np.hypot(*np.meshgrid(np.fft.rfftfreq(values.shape[1]), np.fft.fftfreq(values.shape[0])))
    cut, width = rng.uniform(0.08, 0.22), rng.uniform(0.01, 0.025)
    band = 1 + gain * np.exp(-(((radius - cut) / width) ** 2) / 2)
    kept = np.where(radius > cut + 2 * width, 0.3 if rng.random() < 0.5 else 1.0, band)
    spectrum = np.fft.rfft2(values, axes=(0, 1)) * kept[..., None]
    back = np.fft.irfft2(spectrum, s=values.shape[:2], axes=(0, 1))
    return Image.fromarray(np.clip(np.rint(back), 0, 255).astype(np.uint8), "RGB")


def enlarge(picture: Image.Image, factor: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The picture at ``factor`` times its size."""
    return picture.resize((picture.width * factor, picture.height * factor), kernel)


def through_small(picture: Image.Image, factor: int, kernel: Image.Resampling) -> Image.Image:
    """Reduced by ``factor`` and enlarged again: what a super-resolution method is given, enlarged plainly."""
    small = picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.BICUBIC)
    return small.resize(picture.size, kernel)


@dataclass
class Rung:
    """One picture of a ladder.

    Args:
        picture: what is shown.
        level: strength of its fault; lower is better within the ladder.
        name: the single distortion it shows, ``"clean"``, or None where that is not to be named.
        score: assumed score, NaN where nothing is assumed.
    """

    picture: Image.Image
    level: float
    name: str | None
    score: float


def crop(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """A square part; a smaller picture is enlarged first."""
    if min(picture.size) < side:
        scale = side / min(picture.size)
        picture = picture.resize((round(picture.width * scale + 0.5), round(picture.height * scale + 0.5)))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def distortion_ladder(picture: Image.Image, side: int, rungs: int, clean: bool, rng: np.random.Generator) -> list[Rung]:
    """A crop without and with one distortion at rising strengths between the stated ones."""
    part = crop(picture, side, rng)
    name, seed = list(DISTORTIONS)[int(rng.integers(len(DISTORTIONS)))], int(rng.integers(2**31))
    strengths = DISTORTIONS[name].strengths
    levels = np.sort(rng.choice(LEVELS, rungs - 1, replace=False)) + 1
    ladder = [Rung(part, 0, "clean" if clean else None, PRISTINE if clean else np.nan)]
    for level in levels:
        shown = distort_by(part, name, strengths[level - 1], seed)
        ladder.append(Rung(shown, float(level), name, assumed_score(PRISTINE, name, level) if clean else np.nan))
    return ladder


def enlargement_ladder(picture: Image.Image, side: int, rungs: int, rng: np.random.Generator) -> list[Rung]:
    """An enlarged crop, the same with one of the faults at rising strengths, and for half of them the original."""
    factor = (2, 4)[int(rng.integers(2))]
    kernel = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)[int(rng.integers(2))]
    fault, seed, ladder = FAULTS[int(rng.integers(len(FAULTS)))], int(rng.integers(2**31)), []
    if rng.random() < 0.5:
        start = enlarge(crop(picture, side // factor, rng), factor, kernel)
    else:
        part = crop(picture, side, rng)
        start = through_small(part, factor, kernel)
        ladder.append(Rung(part, -2.0, None, np.nan))
    ladder.append(Rung(start, 0, None, np.nan))
    for level in np.sort(rng.choice(LEVELS, rungs - len(ladder), replace=False)) + 1:
        ladder.append(Rung(add_fault(start, fault, int(level), seed), float(level), None, np.nan))
    return ladder


def restoration_ladder(
    original: Image.Image, restored: Image.Image, rungs: int, rng: np.random.Generator
) -> list[Rung]:
    """The original, what a network restored of it, and that with one of the faults at rising strengths."""
    fault, seed = FAULTS[int(rng.integers(len(FAULTS)))], int(rng.integers(2**31))
    ladder = [Rung(original, -2.0, None, np.nan), Rung(restored, 0, None, np.nan)]
    for level in np.sort(rng.choice(LEVELS, rungs - 2, replace=False)) + 1:
        ladder.append(Rung(add_fault(restored, fault, int(level), seed), float(level), None, np.nan))
    return ladder
