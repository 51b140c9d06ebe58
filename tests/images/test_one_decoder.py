"""The same file gives the same pixels to everything that looks at images."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from colour_profiles import P3, profile
from PIL import Image, ImageCms

from vqr1_metric.evaluation.pictures import load_picture
from vqr1_metric.images import load_image
from vqr1_metric.images.ahead import read_images

ROOT = Path(__file__).resolve().parents[2]
VALUES = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def nasty_files(folder: Path) -> list[Path]:
    """Turned, transparent, deep, in another colour space, of inks."""
    image, exif = Image.fromarray(VALUES), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(folder / "clear.png")
    clear.save(folder / "clear.webp", lossless=True)
    Image.fromarray(VALUES[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    image.save(folder / "wide.png", icc_profile=profile(P3, 2.2))
    image.save(folder / "wide.jpg", icc_profile=profile(P3, 2.2), exif=exif)
    image.convert("CMYK").save(folder / "inks.jpg")
    image.quantize(8).save(folder / "palette.gif")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(folder / "tagged.tif", icc_profile=srgb)
    return sorted(folder.iterdir())


def test_every_way_in_gives_the_same_pixels(tmp_path):
    serve = pytest.importorskip("vqr1_metric.serve.intake")
    from vqr1_metric.serve.limits import Limits

    paths = nasty_files(tmp_path)
    ahead = dict(read_images(paths))
    for path in paths:
        expected = load_image(path)
        given = serve.Picture(path.name, io.BytesIO(path.read_bytes()))
        with Image.open(path) as opened, path.open("rb") as file:
            found = {
                "bytes": load_image(path.read_bytes()),
                "file": load_image(file),
                "opened": load_image(opened),
                "ahead": ahead[str(path)],
                "served": serve.decode(given, serve.open_picture(given, Limits())),
                "evaluated": torch.from_numpy(np.array(load_picture(path))).permute(2, 0, 1),
            }
        for way, pixels in found.items():
            assert torch.equal(pixels, expected), (path.name, way)


def test_image_files_are_opened_in_one_place():
    opening = re.compile(r"\bImage\.open\(")
    for folder in ("vqr1_metric", "integrations"):
        for file in (ROOT / folder).rglob("*.py"):
            if "images" not in file.parts:
                assert not opening.search(file.read_text(encoding="utf-8")), file
