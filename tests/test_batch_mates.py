"""A picture's score is its own: its batch mates, tiny, huge or damaged, and the order change nothing but rounding."""

from pathlib import Path

import pytest
import torch

from tolerances import batch_room
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

DTYPES = ["float32", "bfloat16"]
SETTINGS = {"min_pixels": 56 * 56, "max_pixels": 128 * 128}
SIZES = [(300, 260), (100, 640), (64, 64), (500, 30), (97, 131)]


@pytest.fixture
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mate", ["1x1", "wide", "damaged", "float"])
def test_one_more_picture_changes_nothing(tiny_model: Path, images: list[torch.Tensor], dtype: str, mate: str):
    scorer = QualityScorer(str(tiny_model), dtype=dtype, device="cpu", **SETTINGS)
    room = batch_room(str(tiny_model), dtype, images, **SETTINGS)
    newcomer = {
        "1x1": torch.zeros(3, 1, 1, dtype=torch.uint8),
        "wide": torch.full((3, 20, 2000), 128, dtype=torch.uint8),
        "damaged": b"no picture",
        "float": torch.rand(3, 90, 90),
    }[mate]
    without = [result.score for result in scorer.score(images)]
    beside = scorer.score([*images[:2], newcomer, *images[2:]])
    assert (beside.pop(2).error is not None) == (mate == "damaged")
    assert [result.score for result in beside] == pytest.approx(without, abs=room)
    assert max(without) - min(without) > 5 * room


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_together_and_backwards(tiny_model: Path, images: list[torch.Tensor], dtype: str):
    scorer = QualityScorer(str(tiny_model), dtype=dtype, device="cpu", **SETTINGS)
    room = batch_room(str(tiny_model), dtype, images, **SETTINGS)
    alone = [scorer.score(image)[0].score for image in images]
    together = [result.score for result in scorer.score(images)]
    backwards = [result.score for result in scorer.score(images[::-1])][::-1]
    assert together == pytest.approx(alone, abs=room)
    assert backwards == pytest.approx(alone, abs=room)
