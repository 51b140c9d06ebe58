"""Tensors and arrays of another form or range are the caller's mistake; NaN pixels are data."""

import numpy as np
import pytest
import torch
from PIL import Image

from vqr1_metric.images import FloatRange, ImageContractError, ImageError, check_images, load_image

RAMP = torch.linspace(0, 1, 192).reshape(3, 8, 8)


def spread(low: float, high: float) -> torch.Tensor:
    return low + (high - low) * RAMP


def overshooting(low: float, high: float) -> torch.Tensor:
    image = RAMP.clone()
    image[0, 0, 0], image[1, 1, 1] = low, high
    return image


@pytest.mark.parametrize(
    ("image", "hint", "never"),
    [
        (overshooting(-0.058, 1.111), "clamp=True", ("/ 255", "/ 2", "data_range")),
        (overshooting(-0.004, 0.996), "clamp=True", ("/ 255", "/ 2", "data_range")),
        (overshooting(0, 1.3), "clamp=True", ("/ 255", "/ 2", "data_range")),
        (spread(-1, 1), r"pass \(x \+ 1\) / 2 or data_range=\(-1, 1\)", ("255",)),
        (spread(-1.1, 1.05), r"data_range=\(-1, 1\), with clamp=True", ("255",)),
        (spread(0, 255), "pass x / 255, uint8 or data_range=255", ("/ 2 ", "(-1")),
        (spread(-3, 259), "data_range=255, with clamp=True", ("/ 2 ",)),
        (spread(-2.1, 2.6), "undo the normalisation.* clamp=True", ("/ 255", "/ 2 ")),
        (spread(0, 5), "undo the normalisation.* clamp=True", ("/ 255", "/ 2 ")),
        (spread(-0.4, 0.9), "undo the normalisation.* clamp=True", ("/ 255", "/ 2 ")),
        (spread(0, 65535), "undo the normalisation.*data_range=", ("/ 255", "/ 2 ")),
    ],
)
def test_the_way_out_is_what_the_values_suggest(image, hint, never):
    for given in (image, image.permute(1, 2, 0).numpy(), image.half() if image.abs().max() < 1000 else image):
        with pytest.raises(
            ImageContractError, match=rf"expected floats in \[0, 1\], but got values from .*{hint}"
        ) as said:
            load_image(given)
        assert "clamp" in str(said.value) and not [word for word in never if word in str(said.value)]


def test_all_of_a_call_are_checked_and_counted():
    bad = overshooting(-0.1, 1.2)
    with pytest.raises(ImageContractError, match=r"^2 of 4 images, the first of them image 1: .*from -0\.1 to 1\.2"):
        check_images([RAMP, bad, RAMP, bad])
    with pytest.raises(ImageContractError, match=r"^1 of 2 tensors and arrays, the first of them b: .*int64"):
        check_images(["a.png", RAMP.long(), RAMP], names=["a.png", "b", "c"])
    with pytest.raises(ImageContractError, match=r"^image 0: expected floats"):
        check_images([bad])
    check_images([])
    check_images([RAMP, RAMP.numpy().transpose(1, 2, 0), "nowhere.png", b""])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_data(bad):
    image = RAMP.clone()
    image[1, 2, 3] = bad
    check_images([image, image.numpy().transpose(1, 2, 0)])
    for floats in (FloatRange(), FloatRange.of((0, 1), clamp=True)):
        with pytest.raises(ImageError, match="holds NaN or infinity") as said:
            load_image(image, floats=floats)
        assert not isinstance(said.value, ImageContractError)


def test_clamp_and_data_range():
    clamped = load_image(overshooting(-0.3, 7), floats=FloatRange.of(clamp=True))
    torch.testing.assert_close(clamped, overshooting(0, 1), rtol=0, atol=0)
    for data_range, low, high in (((-1, 1), -1, 1), (255, 0, 255), ((0, 255), 0, 255), (2.5, 0, 2.5)):
        floats = FloatRange.of(data_range)
        torch.testing.assert_close(load_image(spread(low, high), floats=floats), RAMP, rtol=0, atol=1e-6)
        array = spread(low, high).permute(1, 2, 0).numpy()
        torch.testing.assert_close(load_image(array, floats=floats), RAMP, rtol=0, atol=1e-6)
        with pytest.raises(ImageContractError, match=rf"in \[{low}, {high}\].*clamp"):
            load_image(spread(low - 0.02 * (high - low), high), floats=floats)
        rounded = load_image(spread(low, high + 5e-4 * (high - low)), floats=floats)
        assert float(rounded.max()) == 1
    levels = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    assert torch.equal(load_image(levels, floats=FloatRange.of((-1, 1))), levels)  # of floats only


def test_data_range_keeps_gradients():
    image = spread(-1, 1).requires_grad_()
    load_image(image, floats=FloatRange.of((-1, 1))).sum().backward()
    torch.testing.assert_close(image.grad[:, 1:-1], torch.full((3, 6, 8), 0.5))


@pytest.mark.parametrize("wrong", [(1, 0), (0, 0), (0, 1, 2), "255", None, (0, float("nan")), (0, float("inf")), -3])
def test_a_data_range_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"data_range as \(low, high\)"):
        FloatRange.of(wrong)


def test_clamp_is_a_switch():
    with pytest.raises(ValueError, match="clamp to be True or False"):
        FloatRange.of(clamp=0.5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"\(C, H, W\): transpose it"),
        (torch.rand(8, 9, 3), r"permute it to \(C, H, W\)"),
        (torch.rand(2, 4, 3, 8, 8), r"video.*x\.flatten\(0, 1\)"),
        (torch.rand(2, 3, 4, 8, 8), r"video.*x\.movedim\(1, 2\)\.flatten\(0, 1\)"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), r"video.*x\.reshape\(-1, \*x\.shape\[2:\]\)"),
        (torch.rand(8), "labels"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"x\.to\(torch\.uint8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint16), r"x\.float\(\) / 65535"),
        (np.zeros((8, 8), bool), "a mask has no quality"),
        (torch.zeros(3, 8, 8, dtype=torch.float8_e5m2), "float8_e5m2"),
    ],
)
def test_wrong_forms_come_with_the_line_that_works(image, message):
    with pytest.raises(ImageContractError, match=message):
        load_image(image)
    with pytest.raises(ImageContractError, match=message):
        check_images([image])


def test_an_image_of_floats_made_in_memory_is_checked_too():
    with pytest.raises(ImageContractError, match="pass x / 255"):
        check_images([Image.fromarray(np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8))])
