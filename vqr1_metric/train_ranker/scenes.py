"""Which images show the same scene? They must not stand on both sides of a split: a model remembers what it saw.

A scene is known by a column of the labels, by the naming of data sets that are known, or by what the images show.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqr1_metric.ratings import RatedImage, RatingSet
from vqr1_metric.ratings.sets import raise_problems

#: Image ``id`` -> its thumbnail.
Thumbnails = Mapping[int, Tensor]

#: How data sets of distorted references call their images; the first group is the reference.
NAMINGS = (
    re.compile(r"(i\d{2})_\d{2}_\d{1,2}", re.IGNORECASE),  # KADID-10k, TID2008, TID2013
    re.compile(r"([a-z]?\d{4})_\d{2}_\d{2}", re.IGNORECASE),  # PIPAL
    re.compile(r"(.+)\.(?:awgn|blur|contrast|fnoise|jpeg|jpeg2000)\.\d", re.IGNORECASE),  # CSIQ
)
#: So large a share of a set's names must be of a naming.
_MOST = 0.9
_SIDE = 16
#: Correlation of two thumbnails of one scene. Measured on 16 Kodak pictures, 16 distortions at levels 3, 5 and 8: all
#: versions lie above .98, but for strong posterising (.77), darkening (.95) and overexposure (.15); different Kodak
#: pictures lie below .44. Of 1,500 photographs of BIQ2021 24 to 50 pairs lie above, most of them the same scene.
ALIKE = 0.93
_CHUNK = 2048


def scenes_of(s: RatingSet, thumbnails: Thumbnails | None = None) -> list[str] | None:
    """The scene of each image; None where only the content could tell, and no thumbnails are given."""
    if all(image.scene for image in s.images):
        return [str(image.scene) for image in s.images]
    stems = [re.sub(r"\.\w+$", "", image.name.replace("\\", "/").rsplit("/", 1)[-1]) for image in s.images]
    for naming in NAMINGS:
        matches = [naming.fullmatch(stem) for stem in stems]
        if sum(match is not None for match in matches) >= _MOST * len(stems):
            return [match[1].lower() if match else stem for match, stem in zip(matches, stems, strict=True)]
    if thumbnails and all(id(image) in thumbnails for image in s.images):
        first = first_alike(torch.stack([thumbnails[id(image)] for image in s.images]))
        return [s.images[i].name for i in first]
    return None


def thumbnail(image: Tensor) -> Tensor:
    """What an image ``(3, H, W)`` shows, small: grey, without its mean and its slopes, of length 1, ``(256,)``."""
    grey = image.float().mean(0, keepdim=True)[None]
    small = torch.nn.functional.adaptive_avg_pool2d(grey, _SIDE).flatten()
    y, x = torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij")
    # Many photographs are bright above and dark below; that alone makes no scene.
    plane = torch.linalg.qr(torch.stack([torch.ones(_SIDE, _SIDE), x.float(), y.float()], -1).view(-1, 3)).Q
    rest: Tensor = small - plane @ (plane.T @ small)
    unit: Tensor = rest / torch.linalg.norm(rest).clamp(min=1e-6)
    return unit


def first_alike(thumbnails_ND: Tensor) -> list[int]:
    """For each image the first one of its scene; images alike to a third are alike."""
    parent = list(range(len(thumbnails_ND)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for start in range(0, len(thumbnails_ND), _CHUNK):
        alike = thumbnails_ND[start : start + _CHUNK] @ thumbnails_ND.T > ALIKE
        for i, j in alike.nonzero().tolist():
            a, b = root(start + i), root(j)
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(parent))]


def check_apart(train: Sequence[RatingSet], validation: Sequence[RatingSet], thumbnails: Thumbnails) -> None:
    """Complain about a scene in training and validation.

    Scenes of one set (or of two sets that call them alike and show the like) are certain, which is an error. Images
    that only look alike give a warning.

    Raises:
        RatingError: lists the images with file and line.
    """
    seen: dict[str, list[tuple[str, RatedImage]]] = defaultdict(list)
    for s in train:
        for image, scene in zip(s.images, scenes_of(s) or [""] * len(s), strict=True):
            if scene:
                seen[scene].append((s.name, image))
    certain: list[str] = []
    for s in validation:
        for image, scene in zip(s.images, scenes_of(s) or [""] * len(s), strict=True):
            for name, other in seen.get(scene, ()):
                if name == s.name or float(thumbnails[id(image)] @ thumbnails[id(other)]) > ALIKE:
                    certain.append(f"{image.where}: {image.name} shows {scene}, as {other.name} does ({other.where})")
                    break
    raise_problems("no scene in both training and validation", certain)
    shared = _alike(train, validation, thumbnails)
    if shared:
        image, other = shared[0]
        warnings.warn(
            f"{len(shared)} validation pictures look like training pictures ({image.name} like {other.name}, ...): if "
            "they show the same scenes, validation figures are too good. Name the scenes in a column (reference) or "
            "split them otherwise.",
            stacklevel=2,
        )


def _alike(
    train: Sequence[RatingSet], validation: Sequence[RatingSet], thumbnails: Thumbnails
) -> list[tuple[RatedImage, RatedImage]]:
    ours = [image for s in train for image in s.images]
    theirs = [image for s in validation for image in s.images]
    if not ours or not theirs:
        return []
    trained = torch.stack([thumbnails[id(image)] for image in ours])
    found = []
    for start in range(0, len(theirs), _CHUNK):
        part = theirs[start : start + _CHUNK]
        best = (torch.stack([thumbnails[id(image)] for image in part]) @ trained.T).max(1)
        pairs = zip(part, best.values.tolist(), best.indices.tolist(), strict=True)
        found += [(image, ours[j]) for image, value, j in pairs if value > ALIKE]
    return found
