"""Distortions: eight levels each, deterministic, really stronger from level to level."""

import itertools

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.images.distortions import DISTORTIONS, LEVELS, distort, ladder


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """A colourful picture with edges, smooth ground and texture, 160x128."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:128, 0:160].astype(np.float32)
    base = np.stack([120 + 90 * np.sin(x / 9), 60 + y, 200 - 0.8 * x], axis=-1)
    base[30:90, 40:110] = (220, 70, 40)
    base[60:, 90:] += rng.normal(0, 25, (68, 70, 1))
    return Image.fromarray(base.clip(0, 255).astype(np.uint8), "RGB")


def _error(a: Image.Image, b: Image.Image) -> float:
    return float(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean())


@pytest.mark.parametrize("name", DISTORTIONS)
def test_error_grows_strictly_over_eight_levels(name: str, scene: Image.Image) -> None:
    rungs = ladder(scene, name, seed=1)
    assert len(rungs) == LEVELS + 1 == 9
    assert all(rung.size == scene.size and rung.mode == "RGB" for rung in rungs)
    errors = [_error(rung, scene) for rung in rungs]
    assert errors[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("name", DISTORTIONS)
def test_same_seed_same_pixels_and_input_untouched(name: str, scene: Image.Image) -> None:
    before = scene.tobytes()
    assert distort(scene, name, 4, seed=7).tobytes() == distort(scene, name, 4, seed=7).tobytes()
    assert scene.tobytes() == before


def test_another_seed_gives_another_pattern(scene: Image.Image) -> None:
    for name in ("noise", "grey_noise", "impulse_noise", "motion_blur", "colour_cast"):
        assert distort(scene, name, 4, seed=1).tobytes() != distort(scene, name, 4, seed=2).tobytes()


def test_strengths_are_eight_and_ordered() -> None:
    for entry in DISTORTIONS.values():
        assert len(entry.strengths) == LEVELS
        assert len(set(entry.strengths)) == LEVELS
        assert list(entry.strengths) in (sorted(entry.strengths), sorted(entry.strengths, reverse=True))


def test_grey_pictures_are_taken_as_rgb(scene: Image.Image) -> None:
    assert distort(scene.convert("L"), "blur", 1).mode == "RGB"


@pytest.mark.parametrize(("name", "level"), [("sepia", 1), ("blur", 9), ("blur", -1), ("blur", 1.5)])
def test_wrong_calls_say_what_was_expected(name: str, level: int, scene: Image.Image) -> None:
    with pytest.raises(ValueError, match="Expected"):
        distort(scene, name, level)
