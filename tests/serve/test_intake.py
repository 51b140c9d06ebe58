"""Mutated picture files: pixels or a reason, never anything else."""

import io
import random

import pytest
import torch
from PIL import Image

from vqr1_metric.images import ImageError
from vqr1_metric.serve.intake import Picture, decode, open_picture
from vqr1_metric.serve.limits import Limits

from .conftest import encoded

LIMITS = Limits(pixels=1_000_000)
KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out or doubled, most of them near the headers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = min(int(rng.expovariate(1 / 60)), len(data) - 1) if rng.random() < 0.7 else rng.randrange(len(data))
        action = rng.random()
        if action < 0.6:
            data[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif action < 0.75:
            del data[at : at + rng.randint(1, 20)]
        elif action < 0.9:
            data[at:at] = data[at : at + rng.randint(1, 20)]
        else:
            del data[max(at, 8) :]
        if len(data) < 2:
            break
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str) -> None:
    rng = random.Random(kind)
    original = encoded(1, (40, 30), kind)
    errors, named = 0, True
    for _ in range(1500):
        picture = Picture("x", io.BytesIO(mutated(original, rng)))
        try:
            pixels = decode(picture, open_picture(picture, LIMITS))
        except ImageError as error:
            errors += 1
            named &= str(error).startswith("x: ")
        else:
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels[0].numel() <= LIMITS.pixels
    assert errors > 0 and named
    whole = Picture("x", io.BytesIO(original))
    assert decode(whole, open_picture(whole, LIMITS)).shape == (3, 30, 40)


def test_only_listed_formats_are_opened() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PCX")
    with pytest.raises(ImageError, match=r"is a PCX file|not a picture"):
        open_picture(Picture("x", file), LIMITS)
