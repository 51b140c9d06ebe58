"""What pictures are accepted, what becomes of their pixels, and what is said of those that are refused."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqr1_metric.images import MAX_PIXELS, ImageContractError, ImageError, load_image


def noise(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def picture(mode: str = "RGB", height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(noise(height, width)).convert(mode)


def file_of(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# ---------------------------------------------------------------- files that are fine


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP", "JPEG", "JPEG2000"])
def test_every_way_to_hand_over_a_picture_gives_the_same_pixels(tmp_path: Path, format: str):
    data = file_of(picture(), format)
    path = tmp_path / "picture.bin"  # the content decides, not the suffix
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as opened:
        expected = pixels_of(opened)
    assert expected.shape == (3, 40, 60)
    for image in (
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        expected.permute(1, 2, 0).numpy(),
        expected,
    ):
        torch.testing.assert_close(load_image(image), expected, rtol=0, atol=0)
    with Image.open(path) as opened:
        torch.testing.assert_close(load_image(opened), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 200)])
def test_tiny_pictures_are_accepted(size: tuple[int, int]):
    assert load_image(file_of(picture("RGB", *size), "PNG")).shape == (3, *size)


def test_a_picture_20000_pixels_wide_is_accepted():
    assert load_image(file_of(picture("RGB", 200, 20_000), "PNG")).shape == (3, 200, 20_000)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_colour_modes_become_rgb(mode: str):
    image = picture(mode)
    torch.testing.assert_close(load_image(image), pixels_of(image))


def test_cmyk_jpeg():
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    mean = load_image(file_of(red, "JPEG")).float().mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor([255.0, 0.0, 0.0]), atol=5, rtol=0)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    expected = torch.arange(256, dtype=torch.uint8).reshape(16, 16).expand(3, -1, -1)
    for image in (file_of(Image.fromarray(ramp), "PNG"), file_of(Image.fromarray(ramp), "TIFF"), Image.fromarray(ramp)):
        torch.testing.assert_close(load_image(image), expected)
    torch.testing.assert_close(load_image(ramp), expected)
    torch.testing.assert_close(load_image(np.stack([ramp] * 3, -1)), expected)
    torch.testing.assert_close(load_image(Image.fromarray(ramp.astype(np.int32))), expected)  # mode I


def test_more_than_sixteen_bits_are_refused():
    with pytest.raises(ImageError, match=r"at most 16 bits a channel, but got values up to 70000"):
        load_image(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)))


def test_float_tiff():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    loaded = load_image(file_of(Image.fromarray(ramp), "TIFF"))
    torch.testing.assert_close(loaded, torch.from_numpy(ramp).expand(3, -1, -1))
    with pytest.raises(ImageError, match=r"hdr.tif: expected floats in \[0, 1\].*pass x / 255") as caught:
        load_image(file_of(Image.fromarray(ramp * 200), "TIFF"), "hdr.tif")
    assert not isinstance(caught.value, ImageContractError)  # what a file holds is data
    with pytest.raises(ImageContractError):
        load_image(Image.fromarray(ramp * 200))


def test_transparency_is_laid_over_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)  # black: transparent, half, opaque, opaque
    rgba[..., 3] = [[0, 128], [255, 255]]
    expected = torch.tensor([[255, 127], [0, 0]], dtype=torch.uint8).expand(3, -1, -1)
    image = Image.fromarray(rgba)
    for given in (image, file_of(image, "PNG"), file_of(image, "WEBP", lossless=True, exact=True), rgba):
        torch.testing.assert_close(load_image(given), expected)
    floats = torch.from_numpy(rgba).permute(2, 0, 1) / 255
    torch.testing.assert_close(load_image(floats)[0], torch.tensor([[1.0, 127 / 255], [0.0, 0.0]]))


def test_transparent_palette_and_colour_key():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    for format in ("PNG", "GIF"):
        loaded = load_image(file_of(image, format, transparency=0))
        assert loaded[:, 0, 0].tolist() == [255, 255, 255]
        assert loaded[:, 1, 1].tolist() == [255, 0, 0]
    keyed = load_image(file_of(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert keyed.unique().tolist() == [255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format: str):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(red, format, save_all=True, append_images=[blue, red], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
        opened.seek(2)
        assert load_image(opened)[:, 8, 8].tolist() == [255, 0, 0]
    assert load_image(data)[:, 8, 8].tolist() == [255, 0, 0]


_UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int):
    stored, exif = picture(), Image.Exif()
    exif[0x0112] = orientation
    turn = _UPRIGHT[orientation]
    upright = stored if turn is None else stored.transpose(turn)
    torch.testing.assert_close(load_image(file_of(stored, "PNG", exif=exif)), pixels_of(upright))


def test_broken_exif_does_not_lose_the_picture():
    data = file_of(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert load_image(data).shape == (3, 40, 60)


# ---------------------------------------------------------------- files that are not


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, format: str, share: float):
    data = file_of(picture("RGB", 100, 100), format)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.jpg: is (damaged or truncated|not a picture)"):
        load_image(path)


def test_damaged_files_raise_nothing_but_image_errors():
    """A thousand files with random bytes changed: whatever the decoders do, either pixels come out or an ImageError."""
    random = np.random.default_rng(1)
    originals = [file_of(picture("RGB", 24, 24), format) for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")]
    refused = 0
    for i in range(1000):
        data = bytearray(originals[i % len(originals)])
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(0, 256)
        try:
            assert load_image(bytes(data)).shape[0] == 3
        except ImageError:
            refused += 1
    assert 100 < refused < 1000


def test_empty_and_other_files(tmp_path: Path):
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("no picture")
    with pytest.raises(ImageError, match=r"empty\.png: is empty"):
        load_image(empty)
    with pytest.raises(ImageError, match=r"text\.png: is not a picture that Pillow can read"):
        load_image(text)
    with pytest.raises(ImageError, match="is empty"):
        load_image(b"")


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder, not a picture"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"aaa: no such file \(File name too long\)"):
        load_image("a" * 5000)
    with pytest.raises(ImageError, match="no such file"):
        load_image("nul\0byte.png")


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "locked.png"
    path.write_bytes(file_of(picture(), "PNG"))

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", deny)
    with pytest.raises(ImageError, match=r"locked\.png: cannot be read \(Permission denied\)"):
        load_image(path)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (10, 2001)])
def test_too_thin_pictures_are_refused(size: tuple[int, int]):
    with pytest.raises(ImageError, match=f"thin.png: {size[1]}x{size[0]} pixels is too thin to judge"):
        load_image(file_of(picture("RGB", *size), "PNG"), "thin.png")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (14_000, 14_000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]):
    start = time.process_time()  # of all threads; other programs on the machine do not count
    with pytest.raises(ImageError, match=rf"bomb\.png.*more than {MAX_PIXELS / 1e6:.0f} megapixels"):
        load_image(png_header(*size), "bomb.png")
    assert time.process_time() - start < 1


def test_the_size_limit_is_our_own_whatever_pillow_is_set_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=rf"more than {MAX_PIXELS / 1e6:.0f} megapixels"):
        load_image(png_header(60_000, 60_000), "bomb.png")


def test_large_photographs_give_no_warning():
    """Pillow warns from 89 megapixels on; such cameras exist. (Truncated here, so that the test is quick.)"""
    with pytest.raises(ImageError, match="truncated"):
        load_image(png_header(10_000, 10_000))


# ---------------------------------------------------------------- tensors and arrays


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_tensors_keep_dtype_and_graph(dtype: torch.dtype):
    image = torch.rand(3, 8, 8).to(dtype).requires_grad_()
    loaded = load_image(image)
    assert loaded.dtype == dtype
    loaded.sum().backward()
    torch.testing.assert_close(image.grad, torch.ones_like(image))


def test_grey_tensors_and_arrays_become_three_channels():
    grey = torch.rand(1, 8, 9)
    torch.testing.assert_close(load_image(grey), grey.expand(3, -1, -1))
    torch.testing.assert_close(load_image(grey.unsqueeze(0)), grey.expand(3, -1, -1))
    for array in (noise(8, 9, 1), noise(8, 9, 1)[..., None]):
        torch.testing.assert_close(load_image(array), torch.from_numpy(array.reshape(8, 9)).expand(3, -1, -1))


def test_floats_out_by_rounding_are_clamped():
    loaded = load_image(torch.tensor([-0.0005, 0.5, 1.0009]).reshape(1, 1, 3))
    assert loaded[0, 0].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(bad: float):
    image = torch.rand(3, 8, 8)
    image[1, 2, 3] = bad
    with pytest.raises(ImageError, match="image 4: expected finite values, but it holds NaN or infinity"):
        load_image(image, "image 4")
    with pytest.raises(ImageError, match="expected finite values"):
        load_image(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(2, 8, 8), r"expected 1, 3 or 4 channels in \(C, H, W\), but got \(2, 8, 8\)$"),
        (torch.rand(5, 8, 8), "expected 1, 3 or 4 channels"),
        (torch.rand(8, 9, 3), r"looks like \(H, W, C\): permute it"),
        (torch.rand(8, 8), r"expected a tensor of shape \(C, H, W\), but got \(8, 8\)"),
        (torch.rand(2, 3, 8, 8), r"expected a tensor of shape \(C, H, W\)"),
        (torch.rand(3, 0, 8), "expected at least one pixel"),
        (torch.rand(3, 8, 0), "expected at least one pixel"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "expected uint8 in 0..255 or floats .* torch.int64"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "but got torch.bool"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "but got torch.complex64"),
        (np.zeros((8, 8, 5), np.uint8), r"expected an array of shape \(H, W\) or \(H, W, 1, 3 or 4\)"),
        (np.zeros((3, 8, 8), np.uint8), "expected an array of shape"),
        (np.zeros((0, 0, 3), np.uint8), "expected at least one pixel"),
        (np.zeros((8, 8, 3), np.int32), "expected uint8, uint16 or floats .*int32"),
        (np.zeros((8, 8, 3), object), "expected uint8, uint16 or floats .*object"),
        (Image.new("RGB", (0, 5)), "expected at least one pixel"),
        (torch.empty(3, 8, 8, device="meta"), "expected a dense tensor that holds pixels, but got .* on meta"),
        (torch.rand(3, 8, 8).to_sparse(), "expected a dense tensor that holds pixels, but got torch.sparse_coo"),
        (3.5, "expected a path, bytes, a PIL picture, an open file, an array or a tensor, but got float"),
        (None, "but got NoneType"),
    ],
)
def test_tensors_and_arrays_that_are_no_picture(image, message: str):
    with pytest.raises(ImageContractError, match=message):
        load_image(image)


def test_loading_changes_nothing_it_was_given():
    tensor, array, image = torch.rand(3, 8, 8), noise(8, 8), picture()
    kept = tensor.clone(), array.copy(), np.array(image)
    for given in (tensor, array, image):
        load_image(given)
    assert torch.equal(tensor, kept[0])
    assert (array == kept[1]).all()
    assert (np.array(image) == kept[2]).all()
    read_only = noise(8, 8)
    read_only.flags.writeable = False
    assert load_image(read_only).shape == (3, 8, 8)
