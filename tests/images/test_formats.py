"""Which formats and depths are read, and what is said of the others."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vqr1_metric.images import FORMATS, ImageError, load_image
from vqr1_metric.images.formats import openable, why_unknown

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
LEVELS = torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(3, -1, -1)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(
    values: np.ndarray, bits: int, *, signed: bool = False, white_is_zero: bool = False, order: str = "<"
) -> bytes:
    """An uncompressed grey TIFF; 12-bit samples are packed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    else:
        data = values.astype(f"{order}{'i' if signed else 'u'}{bits // 8}").tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(data)), (339, 2 if signed else 1)]
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    start = 8 + len(data) + len(data) % 2
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", start) + data + bytes(len(data) % 2) + directory + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiffs(order):
    assert torch.equal(load_image(tiff(RAMP, 16, order=order)), LEVELS)


def test_twelve_bit_tiffs_are_scaled_by_their_own_white():
    twelve = np.round(RAMP / 65535 * 4095)
    assert int((load_image(tiff(twelve, 12)).int() - LEVELS.int()).abs().max()) <= 1


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP.astype(int) - 32768, 16, signed=True),
        tiff(RAMP // 4, 32),
        tiff(RAMP // 4, 32, signed=True),
        tiff(RAMP, 16, white_is_zero=True),
    ],
    ids=["signed", "32 bits", "32 bits, signed", "0 is white"],
)
def test_depths_that_cannot_be_read_right_are_refused(data):
    with pytest.raises(ImageError, match=r"expected at most 16 bits a channel|0 is white|of a kind that Pillow cannot"):
        load_image(data)


def test_sixteen_bit_pnm_and_jpeg_2000():
    header = b"P5 16 16 65535\n"
    assert torch.equal(load_image(header + RAMP.astype(">u2").tobytes()), LEVELS)
    colour = np.stack([RAMP] * 3, -1)
    loaded = load_image(b"P6 16 16 65535\n" + colour.astype(">u2").tobytes())
    assert int((loaded.int() - LEVELS.int()).abs().max()) <= 1
    ten_bits = (np.arange(256) * 4 + np.arange(256) // 64).reshape(16, 16)
    loaded = load_image(b"P5 16 16 1023\n" + ten_bits.astype(">u2").tobytes())
    assert int((loaded.int() - LEVELS.int()).abs().max()) <= 1
    assert torch.equal(load_image(file_of(Image.fromarray(RAMP), "JPEG2000")), LEVELS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits(bits):
    count = 1 << bits
    levels = (np.arange(count * 16) % count).reshape(count, 16)
    header = f"P5 16 {count} {count - 1}\n".encode()
    loaded = load_image(header + levels.astype(np.uint8).tobytes())
    expected = torch.from_numpy(np.round(levels * (255 / (count - 1))).astype(np.uint8))
    assert torch.equal(loaded[0], expected)


def test_plugins_are_registered_when_a_file_needs_them(tmp_path):
    pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    image = Image.fromarray(np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "x.ppm")
    write = f"""
import pillow_heif, pillow_jxl
from PIL import Image
image = Image.open({str(tmp_path / "x.ppm")!r})
pillow_heif.from_pillow(image).save({str(tmp_path / "x.heic")!r}, quality=95)
image.save({str(tmp_path / "x.jxl")!r}, "JXL", lossless=True)
"""
    read = f"""
import sys, numpy, vqr1_metric.cli
from vqr1_metric.images import load_image
wanted = load_image({str(tmp_path / "x.ppm")!r}).int()
assert "pillow_heif" not in sys.modules and "pillow_jxl" not in sys.modules
for name in ({str(tmp_path / "x.heic")!r}, {str(tmp_path / "x.jxl")!r}):
    print(int((load_image(name).int() - wanted).abs().max()))
    try:
        load_image(open(name, "rb").read(40))
    except ValueError as error:
        assert "is damaged or truncated" in str(error), error
    else:
        raise AssertionError("a cut file was read")
"""
    for code in (write, read):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) <= 12 and int(done.stdout.split()[1]) == 0


def test_without_a_plugin_its_name_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    assert why_unknown(heic) == "is a HEIC or HEIF file, which Pillow reads with a plug-in: pip install pillow-heif"
    assert "pip install pillow-jxl-plugin" in why_unknown(b"\xff\x0a" + bytes(20))


@pytest.mark.parametrize(
    ("format", "suffix", "said"),
    [
        ("TGA", "tga", "is a TGA file; convert it to PNG, or open it yourself with Pillow"),
        ("PCX", "pcx", "is a PCX file; convert"),
        ("DDS", "dds", "is a DDS file; convert"),
        ("SGI", "sgi", "is an SGI file; convert"),
        ("ICNS", "icns", "is an ICNS file; convert"),
    ],
)
def test_formats_that_are_not_opened_are_named(tmp_path, format, suffix, said):
    path = tmp_path / f"x.{suffix}"
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    image.save(path, format)
    with pytest.raises(ImageError, match=said):
        load_image(path)
    with Image.open(path) as opened:  # the way out works
        assert load_image(opened).shape[0] == 3


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"8BPS\0\x01", "a PSD file"),
        (b"\x76\x2f\x31\x01\x02", "OpenEXR.*pass an array"),
        (b"#?RADIANCE\n", "Radiance"),
        (b"\x93NUMPY\x01", r"pass numpy\.load"),
        (b"%PDF-1.7", "PDF document"),
        (b"<svg xmlns=", "SVG drawing"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\0\0\0\x20ftypisom\0\0", "a video or sound; pass its frames"),
        (b"RIFF\0\0\0\0AVI LIST", "a video or sound"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"a.png\nb.png\n", "text; a list of pictures"),
        (b"PK\x03\x04\x14", "zip archive"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "damaged or truncated"),
        (b"II*\0\x08\0\0\0", "damaged or truncated, or a TIFF of a kind"),
        (bytes(range(200, 232)), "not a picture that Pillow can read$"),
    ],
)
def test_other_files_are_named_with_the_way_out(head, said):
    with pytest.raises(ImageError, match=rf"x: is .*{said}"):
        load_image(head, "x")


def test_only_named_formats_are_opened():
    assert set(openable()) <= set(FORMATS)
    assert {"EPS", "WMF", "PSD", "FITS", "PCX"}.isdisjoint(FORMATS)


def test_reasons_of_what_is_no_file(tmp_path):
    for name, said in (("https://x.org/a.png", "not fetched"), (str(tmp_path / "*.png"), r"glob\.glob")):
        with pytest.raises(ImageError, match=said):
            load_image(name)
    with pytest.raises(ImageError, match="is a folder, not a picture; pass a folder alone"):
        load_image(tmp_path)
