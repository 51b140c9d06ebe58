"""Files that state their colours give the pixels that sRGB has for them."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from colour_profiles import ADOBE, P3, profile, s15, xyz_of
from PIL import Image, ImageCms, PngImagePlugin

from vqr1_metric.images import load_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def expected(pixels: np.ndarray, chromaticities: tuple[float, ...], gamma: float) -> torch.Tensor:
    """By the definitions: linear light, primaries to primaries, sRGB's curve."""
    srgb = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
    matrix = np.linalg.inv(xyz_of(srgb)) @ xyz_of(chromaticities)
    linear = ((pixels / 255) ** gamma) @ matrix.T
    return torch.from_numpy(np.round(encode(linear.clip(0, 1)) * 255)).permute(2, 0, 1)


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_chunks(png: bytes, **chunks: bytes) -> bytes:
    made = b"".join(
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in chunks.items()
    )
    return png[:33] + made + png[33:]  # after the header


def gama(gamma: float) -> bytes:
    return struct.pack(">I", round(gamma * 100_000))


def chrm(chromaticities: tuple[float, ...]) -> bytes:
    return struct.pack(">8I", *(round(value * 100_000) for value in chromaticities))


def assert_near(loaded: torch.Tensor, wanted: torch.Tensor, levels: float = 2) -> None:
    difference = (loaded.float() - wanted.float()).abs()
    assert float(difference.max()) <= levels and float(difference.mean()) < 0.6, (difference.max(), difference.mean())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("primaries", "gamma"), [(P3, 2.2), (ADOBE, 2.2), (ADOBE, 1.0)], ids=["P3", "Adobe", "linear"])
def test_profiles_are_converted_in_every_format(format, primaries, gamma):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format in ("JPEG", "AVIF") else {}
    data = file_of(picture().resize((64, 48), 0), format, icc_profile=profile(primaries, gamma), **options)
    with Image.open(io.BytesIO(data)) as image:
        wanted = expected(np.asarray(image.convert("RGB")), primaries, gamma)
        assert_near(load_image(image), wanted)
    assert_near(load_image(data), wanted)
    assert float((load_image(data).float() - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs().mean()) > 3


def test_srgb_by_any_name_leaves_the_pixels_alone():
    for mode in ("RGB", "RGBA"):
        image = picture(mode)
        stored = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(load_image(file_of(image, "PNG", icc_profile=SRGB)), stored)


def test_grey_profiles():
    image = picture("L")
    levels = np.asarray(image) / 255
    for gamma in (1.0, 1.8):
        wanted = torch.from_numpy(np.round(encode(levels**gamma) * 255)).expand(3, -1, -1)
        assert_near(load_image(file_of(image, "PNG", icc_profile=profile(None, gamma))), wanted, 5)
        assert_near(load_image(file_of(image, "TIFF", icc_profile=profile(None, gamma))), wanted, 5)
    sixteen = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert_near(load_image(file_of(sixteen, "PNG", icc_profile=profile(None, 1.8))), wanted, 5)


def test_a_grey_image_with_the_profile_of_its_colours():
    image = picture("L")
    wanted = torch.from_numpy(np.round(encode((np.asarray(image) / 255) ** 1.0) * 255)).expand(3, -1, -1)
    assert_near(load_image(file_of(image, "PNG", icc_profile=profile(ADOBE, 1.0))), wanted)


def test_transparency_stays_beside_a_profile():
    image = picture("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    opaque = expected(np.asarray(image)[..., :3], P3, 2.2)
    share = torch.from_numpy(np.asarray(alpha) / 255)
    data = file_of(image, "PNG", icc_profile=profile(P3, 2.2))
    assert_near(load_image(data), opaque * share + 255 * (1 - share), levels=3)
    palette = picture().quantize(16)
    data = file_of(palette, "PNG", icc_profile=profile(ADOBE, 1.0))
    assert_near(load_image(data), expected(np.asarray(palette.convert("RGB")), ADOBE, 1.0))


@pytest.mark.parametrize("wrong", [b"no profile", profile(P3, 2.2)[:200], profile(None, 1.0), b""])
def test_a_profile_that_is_broken_or_for_other_images_is_ignored(wrong):
    image = picture()
    stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(load_image(file_of(image, "PNG", icc_profile=wrong)), stored)


def test_png_gamma():
    image = picture()
    plain = file_of(image, "PNG")
    stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    linear = load_image(with_chunks(plain, gAMA=gama(1.0)))
    assert_near(linear, expected(np.array(image), (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), 1.0), levels=1)
    assert torch.equal(load_image(with_chunks(plain, gAMA=gama(0.45455))), stored)
    assert torch.equal(load_image(with_chunks(plain, gAMA=gama(1.0), sRGB=b"\0")), stored)  # sRGB goes first
    assert_near(
        load_image(with_chunks(plain, gAMA=gama(1 / 2.2), cHRM=chrm(ADOBE))), expected(np.array(image), ADOBE, 2.2)
    )
    assert_near(load_image(with_chunks(plain, gAMA=gama(1 / 1.8), cHRM=chrm(P3))), expected(np.array(image), P3, 1.8))
    for nonsense in (gama(0), struct.pack(">I", 2**32 - 1)):
        assert torch.equal(load_image(with_chunks(plain, gAMA=nonsense)), stored)
    assert torch.equal(load_image(with_chunks(plain, cHRM=bytes(32))), stored)


def test_png_gamma_of_sixteen_bits_keeps_the_darks():
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32)  # linear light of at most 1.6%
    data = with_chunks(file_of(Image.fromarray(ramp), "PNG"), gAMA=gama(1.0))
    wanted = torch.from_numpy(np.round(encode(ramp / 65535) * 255)).expand(3, -1, -1)
    assert_near(load_image(data), wanted, levels=0)
    assert len(load_image(data).unique()) > 30


def test_cmyk_profiles_are_converted():
    """An ink that is bluer than Pillow's plain formula has it: the profile's own table decides."""
    lab = ImageCms.createProfile("LAB")
    assert ImageCms.ImageCmsProfile(lab).profile.xcolor_space.strip() == "Lab"
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain = load_image(image)[:, 0, 0].tolist()
    image.info["icc_profile"] = cmyk_profile()
    converted = load_image(image)[:, 0, 0].tolist()
    assert plain == [0, 255, 255] and converted != plain
    assert converted[0] < 60 and 100 < converted[1] < 200 and converted[2] > 180  # a printed cyan
    white = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    white.info["icc_profile"] = cmyk_profile()
    assert min(load_image(white)[:, 0, 0].tolist()) >= 253


def cmyk_profile() -> bytes:
    """A version 2 printer profile whose A2B table has the 16 corners of the ink cube, in Lab."""
    inks = {0: (55, -37, -50), 1: (48, 74, -3), 2: (89, -5, 93)}  # cyan, magenta, yellow of ISO 12647-2
    corners = []
    for corner in range(16):
        on = [(corner >> (3 - ink)) & 1 for ink in range(4)]
        light, a, b = 100.0, 0.0, 0.0
        for ink, colour in inks.items():
            if on[ink]:
                light, a, b = light * colour[0] / 100, a + colour[1], b + colour[2]
        light *= 0.15 if on[3] else 1
        corners.append((light, a * light / 100 if on[3] else a, b * light / 100 if on[3] else b))
    ramp = bytes(range(256))
    table = b"".join(
        bytes((round(light * 2.55), round(a.clip(-128, 127)) + 128, round(b.clip(-128, 127)) + 128))
        for light, a, b in np.array(corners)
    )
    identity = b"".join(s15(float(i == j)) for i in range(3) for j in range(3))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + s15(0.9642) + s15(1) + s15(0.8249)
    tags |= {b"A2B0": lut, b"A2B1": lut}
    index, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        index += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    header = (
        struct.pack(">I", offset + len(data)) + bytes(4) + b"\x02\x10\0\0prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    )
    header += s15(0.9642) + s15(1) + s15(0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + index + data


def test_metadata_of_text_does_not_matter():
    info = PngImagePlugin.PngInfo()
    info.add_text("gamma", "1.0")
    image = picture()
    stored = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(load_image(file_of(image, "PNG", pnginfo=info)), stored)
