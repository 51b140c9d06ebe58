"""Lossy files with damage that Pillow bears: refused where it can be told, and good files never."""

import io
import random
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from vqr1_metric.images import ImageError, load_image


def photo(side: int = 256) -> Image.Image:
    rng = np.random.default_rng(0)
    line = np.linspace(0, 1, side)
    waves = [np.outer(line, line), np.outer(1 - line, line), np.abs(np.sin(np.outer(8 * line, 9 * line)))]
    values = np.stack(waves, -1) * 200 + rng.normal(0, 12, (side, side, 3)) + 20
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


def flat_images() -> dict[str, Image.Image]:
    page = Image.new("RGB", (900, 700), "white")
    for line in range(10):
        ImageDraw.Draw(page).text((100, 60 + 60 * line), "a page of text " * 3, fill="black")
    box = Image.new("RGB", (900, 900))
    ImageDraw.Draw(box).rectangle((400, 400, 460, 460), fill="white")
    gradient = Image.linear_gradient("L").resize((600, 500)).convert("RGB")
    return {"white": Image.new("RGB", (900, 700), "white"), "page": page, "box": box, "gradient": gradient}


KINDS = {
    "JPEG": ("JPEG", {"quality": 80}),
    "JPEG, grey": ("JPEG", {"quality": 80}),
    "JPEG, CMYK": ("JPEG", {"quality": 80}),
    "JPEG, progressive": ("JPEG", {"quality": 80, "progressive": True}),
    "JPEG, optimised": ("JPEG", {"quality": 50, "optimize": True}),
    "JPEG, restarts": ("JPEG", {"quality": 80, "restart_marker_blocks": 16}),
    "WebP": ("WEBP", {"quality": 80}),
    "WebP, low": ("WEBP", {"quality": 10}),
    "WebP, lossless": ("WEBP", {"lossless": True}),
    "AVIF": ("AVIF", {"quality": 75, "speed": 9}),
    "JPEG 2000": ("JPEG2000", {"quality_mode": "rates", "quality_layers": [20], "irreversible": True}),
    "JPEG 2000, tiled": (
        "JPEG2000",
        {"quality_mode": "rates", "quality_layers": [80, 20, 5], "irreversible": True, "tile_size": (128, 128)},
    ),
}  # fmt: skip


def file_of(kind: str, image: Image.Image) -> bytes:
    format, options = KINDS[kind]
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    image = image.convert({"JPEG, grey": "L", "JPEG, CMYK": "CMYK"}.get(kind, "RGB"))
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def refused(data: bytes) -> str | None:
    try:
        load_image(data, "x")
    except ImageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(kind):
    for name, image in {"photo": photo(), **flat_images()}.items():
        data = file_of(kind, image)
        assert refused(data) is None, name
        assert refused(data + b"trailing bytes, as some cameras and editors write them") is None or "JPEG 2" in kind
    assert refused(file_of(kind, photo().resize((1, 1)))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_holes_of_zeros_are_found(kind):
    data = file_of(kind, photo())
    missed = []
    for seed in range(20):
        rng = random.Random(seed)
        size = max(200, round(len(data) * rng.uniform(0.01, 0.1)))
        start = rng.randrange(min(900, len(data) // 3), len(data) - size - 2)
        damaged = data[:start] + bytes(size) + data[start + size :]
        said = refused(damaged)
        if said is None:
            missed.append((start, size))
        else:
            assert "damaged or truncated" in said
    assert not missed, (len(data), missed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("JPEG,") or kind == "JPEG"])
def test_jpegs_that_end_early_or_hold_rubbish_are_found(kind):
    pytest.importorskip("simplejpeg")
    data = file_of(kind, photo())
    scan = data.rfind(b"\xff\xda") + 20 if "progressive" not in kind else data.find(b"\xff\xda") + 20
    rubbish = []
    for seed in range(20):
        rng = random.Random(seed)
        start = rng.randrange(scan, len(data) - 400)
        assert refused(data[:start] + b"\xff\xd9") is not None  # cut, but with an end marker
        assert refused(data[:start]) is not None
        rubbish.append(refused(data[:start] + rng.randbytes(300) + data[start + 300 :]) is not None)
    assert sum(rubbish) >= 18
    assert refused(data[:-2]) is not None  # no end marker


def test_a_few_bytes_before_the_end_marker_are_harmless():
    data = file_of("JPEG", photo())
    assert refused(data[:-2] + b"\0\0" + data[-2:]) is None
    assert refused(data[:-2] + bytes(100) + data[-2:]) is not None


def test_holes_are_found_without_simplejpeg(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    for kind in ("JPEG", "JPEG, progressive", "JPEG, optimised"):
        data = file_of(kind, photo())
        start = len(data) // 2
        assert "a hole of" in refused(data[:start] + bytes(600) + data[start + 600 :])
        for image in flat_images().values():
            assert refused(file_of(kind, image)) is None


def test_an_opened_image_is_looked_at_as_long_as_its_file_is_there(tmp_path):
    data = file_of("JPEG", photo())
    path = tmp_path / "x.jpg"
    path.write_bytes(data[:3000] + bytes(600) + data[3600:])
    with Image.open(path) as image, pytest.raises(ImageError, match=r"x\.jpg: is damaged or truncated \(corrupt JPEG"):
        load_image(image)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "zstd"])
def test_libtiff_is_silent(compression, capfd):
    file = io.BytesIO()
    photo(128).save(file, "TIFF", compression=compression)
    data = file.getvalue()
    for seed in range(10):
        rng = random.Random(seed)
        start = rng.randrange(8, len(data) - 500)
        refused(data[:start] + rng.randbytes(100) + data[start + 100 :])
        refused(data[:start] + data[start + 60 :])
    assert capfd.readouterr().err == ""


def test_damaged_metadata_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = file_of("JPEG", photo())
        assert refused(data[:20] + b"some bytes" + data[20:]) is None
        assert refused(data[:2] + b"\xff\xe1\x00\x0eExif\0\0II*\0\xff\xff" + data[2:]) is None
