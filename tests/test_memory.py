"""Out of memory: smaller batches instead of a crash, and a clear error where a picture does not fit alone."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from stub_scorer import FormulaBackend

from vqr1_metric.backends.batches import fitting_tokens
from vqr1_metric.images import ImageError
from vqr1_metric.scorer import QualityScorer


class SmallDevice(FormulaBackend):
    """A formula with a memory: more tokens than ``room`` in one pass raise, as CUDA does."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.passes = room, []

    def distributions(self, images, pixel_config, *, replies=None):
        longest = max(self.sequence_length(pixel_config.visual_tokens(*x.shape[-2:]), False) for x in images)
        self.passes.append(len(images))
        if longest * len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().distributions(images, pixel_config, replies=replies)


PICTURES = list(torch.rand(20, 3, 112, 112, generator=torch.Generator().manual_seed(0)))  # 17 tokens each


def test_batches_are_halved_until_they_fit_and_stay_small():
    device = SmallDevice(room=17 * 6)
    scorer = QualityScorer(backend=device)
    expected = [r.score for r in QualityScorer(backend=FormulaBackend()).score(PICTURES)]
    with pytest.warns(UserWarning, match="20 pictures at once do not fit") as said:
        results = scorer.score(PICTURES)
    assert [r.score for r in results] == expected
    assert len(said) == 1
    assert device.passes == [20, 10, 5, 5, 10, 5, 5]
    device.passes.clear()
    assert [r.score for r in scorer.score(PICTURES)] == expected  # says nothing, and fails no more
    assert device.passes == [5, 5, 5, 5]


def test_a_picture_that_does_not_fit_alone_has_a_reason_and_the_others_a_score():
    scorer = QualityScorer(backend=SmallDevice(room=100))
    large = torch.rand(3, 560, 560)
    with pytest.warns(UserWarning, match="do not fit"):
        results = scorer.score([PICTURES[0], large, PICTURES[1]])
    assert [r.error is None for r in results] == [True, False, True]
    assert results[1].error.startswith("image 1: 560x560 pixels do not fit into the free memory even alone; lower ")
    with pytest.raises(ImageError, match="image 0: 560x560 pixels do not fit"):
        scorer.distributions([large])


def test_distributions_back_off_too():
    device = SmallDevice(room=17 * 6)
    with pytest.warns(UserWarning, match="do not fit"):
        found = QualityScorer(backend=device).distributions(PICTURES)
    torch.testing.assert_close(found.mean, FormulaBackend().distributions(PICTURES, device.pixel_config).mean)


def test_other_errors_pass():
    class Broken(FormulaBackend):
        def distributions(self, images, pixel_config, *, replies=None):
            raise RuntimeError("no memory problem")

    with pytest.raises(RuntimeError, match="no memory problem"):
        QualityScorer(backend=Broken()).score(PICTURES)


def test_deterministic_puts_every_picture_through_alone():
    device = SmallDevice(room=10_000)
    scorer = QualityScorer(backend=device, deterministic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score(PICTURES[:5])
    assert device.passes == [1] * 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
def test_deterministic_scores_do_not_depend_on_the_others(tiny_qwen2_5_vl, dtype):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype=dtype, deterministic=True)
    pictures = [*torch.rand(64, 3, 56, 56), torch.rand(3, 84, 112)]
    together = scorer.distributions(pictures).probabilities
    assert torch.equal(together[7:8], scorer.distributions([pictures[7]]).probabilities)
    assert torch.equal(together[-1:], scorer.distributions([pictures[-1]]).probabilities)
    elsewhere = scorer.distributions([*pictures[8:], *pictures[:8]]).probabilities
    assert torch.equal(torch.cat([elsewhere[-8:], elsewhere[:-8]]), together)


def test_tokens_that_fit_follow_the_free_memory():
    """Sizes of Qwen2.5-VL-7B in bfloat16: its language model's layer is the largest moment, 171 kB a token."""
    sizes = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(hidden_size=3584, intermediate_size=18944),
        vision_config=SimpleNamespace(hidden_size=1280, intermediate_size=3420, spatial_merge_size=2),
    )
    assert fitting_tokens(1_000_000_000, sizes, 2) == int(0.5e9 / (2 * (8 * 3584 + 3 * 18944)))
    assert fitting_tokens(80_000_000_000, sizes, 2) == 16_384
    assert fitting_tokens(0, sizes, 2) == 1
