"""What is chosen by: pictures that are none, other scorers, alignment, ranks and thresholds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import build

from vqr1_metric.integrations.diffusers import BestOfN, VisualQualityR1Callback
from vqr1_metric.integrations.diffusers.scoring import PictureScorer, flaw
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning"
)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_picture_of_nan_has_no_score(output_type, part):
    """Decoders and denoisers overflow in half precision; what comes out looks black once it is saved."""
    tiny = build("sd")
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if part == "vae":
            output = output.clone()
            output[0] = math.nan
            return output
        if len(calls) == 5:
            output[0][-1] = math.nan  # the last candidate, and with it what guidance makes of it
        return output

    module = tiny.pipe.vae.decoder if part == "vae" else tiny.pipe.unet
    module.register_forward_hook(spoil)
    out = BestOfN(tiny.pipe, formula_scorer())(n=3, keep=3, output_type=output_type, **tiny.arguments)
    bad = 0 if part == "vae" else 2
    assert out.seeds[-1] == bad
    assert [math.isnan(score) for score in out.scores] == [False, False, True]
    assert any(word in out.records[bad].result.error for word in ("NaN", "black"))
    assert [place.rank for place in out.ranking][-1] is None


def test_a_preview_of_nan_does_not_survive(sd):
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output[0][-1] = math.nan
        return output

    sd.pipe.unet.register_forward_hook(spoil)
    out = BestOfN(sd.pipe, formula_scorer())(n=3, preview_at_ratio=0.4, survivors=2, **sd.arguments)
    assert [record.survived for record in out.records] == [True, True, False]
    assert "NaN" in out.records[2].preview_result.error


def test_flaws():
    noise = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    black = np.zeros((8, 8, 3), dtype=np.float32)
    holed = noise.copy()
    holed[3, 3, 0] = np.inf
    whole = Image.fromarray((noise * 255).astype(np.uint8))
    for good in (noise, torch.from_numpy(noise).permute(2, 0, 1), whole, [Image.new("RGB", (8, 8)), whole], noise[None],
                 np.stack([black, noise])):  # fmt: skip
        assert flaw(good) is None
    for bad, why in [(holed, "NaN"), (torch.from_numpy(holed).permute(2, 0, 1), "NaN"), (black, "black"),
                     (Image.new("RGB", (8, 8)), "black"), (Image.new("RGBA", (8, 8), (0, 0, 0, 255)), "black"),
                     ([Image.new("RGB", (8, 8))] * 3, "black"), (np.stack([noise, holed]), "NaN")]:  # fmt: skip
        assert why in flaw(bad)
        result = PictureScorer(formula_scorer())([bad])[0]
        assert math.isnan(result.score)
        assert why in result.error


def test_the_callback_has_no_score_for_a_black_preview(sd):
    callback = VisualQualityR1Callback(
        formula_scorer(), at_step=2, decode=lambda pipe, latents: [Image.new("RGB", (32, 32))] * len(latents)
    )
    sd.pipe(**sd.arguments, callback_on_step_end=callback)
    assert math.isnan(callback.records[0].score)
    assert "black" in callback.records[0].result.error


def reds(pictures, prompt):
    return [float(np.asarray(picture)[..., 0].mean()) for picture in pictures]


@pytest.mark.parametrize("fail", ["nan", "raise"])
@pytest.mark.parametrize("combine", ["sum", "product", "rank"])
def test_a_side_scorer_that_fails_leaves_the_choice_to_quality(sd, fail, combine):
    def broken(pictures, prompt):
        if fail == "raise":
            raise RuntimeError("no model")
        return [math.nan] * len(pictures)

    quality = BestOfN(sd.pipe, formula_scorer())(n=6, keep=6, **sd.arguments)
    best = BestOfN(sd.pipe, formula_scorer(), also={"broken": (broken, 1.0)}, combine=combine)
    assert best(n=6, keep=6, **sd.arguments).seeds == quality.seeds
    pruned = BestOfN(sd.pipe, formula_scorer())(n=6, preview_at_ratio=0.4, survivors=2, **sd.arguments)
    out = best(n=6, preview_at_ratio=0.4, survivors=2, **sd.arguments)
    assert [record.survived for record in out.records] == [record.survived for record in pruned.records]


def scored(extras, also, **options):
    scorer = PictureScorer(formula_scorer(), also=also, **options)
    return scorer.choose_by([3.0, 4.0, 2.0, math.nan], [{"a": e} for e in extras])


def test_a_number_that_is_missing_counts_as_the_mean_of_the_others():
    also = {"a": (len, 2.0)}
    assert [v for v, _ in scored([1.0, math.nan, 3.0, 9.0], also)][:3] == [5.0, 8.0, 8.0]
    assert math.isnan(scored([1.0, 1.0, 1.0, 9.0], also)[3][0])  # no quality, no value
    values = [v for v, _ in scored([4.0, 1.0, math.nan, 1.0], also, combine="product")]
    assert values[:3] == [3.0 * 16, 4.0, 2.0 * 2.5**2]
    values = [v for v, _ in scored([1.0, 2.0, 3.0, 1.0], also, combine="rank")]
    assert values[:3] == pytest.approx([(0.5 + 0) / 3, (1 + 2 * 0.5) / 3, (0 + 2 * 1) / 3], abs=0.2)
    assert values[2] > values[0]


def test_thresholds_come_first(sd):
    numbers = iter([1.0, 5.0, 1.0, 5.0, 1.0, 5.0])
    best = BestOfN(
        sd.pipe,
        formula_scorer(),
        also={"align": (lambda p, _: [next(numbers) for _ in p], 0.0)},
        thresholds={"align": 3.0},
    )
    out = best(n=6, keep=6, **sd.arguments)
    assert [seed % 2 for seed in out.seeds] == [1, 1, 1, 0, 0, 0]
    for half in (out.scores[:3], out.scores[3:]):
        assert half == sorted(half, reverse=True)
    assert [record.missed for record in out.records][:2] == [["align"], []]
    quality = BestOfN(sd.pipe, formula_scorer(), thresholds={"quality": 9.0})(n=2, keep=2, **sd.arguments)
    assert all(record.missed == ["quality"] for record in quality.records)
    with pytest.raises(ValueError, match="thresholds of quality or of what also holds, but got clip"):
        BestOfN(sd.pipe, formula_scorer(), thresholds={"clip": 1.0})
    with pytest.raises(ValueError, match="combine to be"):
        BestOfN(sd.pipe, formula_scorer(), combine="mean")


class Alignment:
    """A scorer that asks whether the picture is what the prompt says."""

    def __init__(self):
        self.asked = []

    def score(self, images, prompts=None):
        self.asked += prompts
        return [SimpleNamespace(score=1.0 + len(prompt)) for prompt in prompts]


class Plain:
    def score(self, images):
        return [SimpleNamespace(score=2.0) for _ in images]


def test_scorers_with_prompts_and_without(sd):
    align = Alignment()
    best = BestOfN(sd.pipe, formula_scorer(), also={"align": (align, 1.0), "plain": (Plain(), 1.0)})
    out = best(n=2, **sd.arguments)
    assert align.asked == ["a lighthouse"] * 2
    assert out.records[0].extras == {"align": 13.0, "plain": 2.0}
    assert out.records[0].value == pytest.approx(out.records[0].score + 15)

    # With embeddings there is no prompt to tell: it is given apart.
    embeddings = sd.pipe.encode_prompt("a", "cpu", 1, False)[0]
    common = {name: value for name, value in sd.arguments.items() if name != "prompt"}
    negative = torch.zeros_like(embeddings)
    best(n=1, prompt_embeds=embeddings, negative_prompt_embeds=negative, scored_prompt="a", **common)
    assert align.asked[2:] == ["a"]
    best(["x", "y"], n=1, scored_prompt=["xx", "yy"], **common)
    assert align.asked[3:] == ["xx", "yy"]
    with pytest.raises(ValueError, match="Expected 2 entries of scored_prompt, but got 1"):
        best(["x", "y"], n=1, scored_prompt=["xx"], **common)


def test_ranks_need_no_common_unit(sd):
    up = BestOfN(sd.pipe, formula_scorer(), also={"red": (reds, 5.0)}, combine="rank")(n=5, keep=5, **sd.arguments)
    by_red = sorted(up.records, key=lambda record: -record.extras["red"])
    assert up.seeds[0] == by_red[0].seed
    scaled = BestOfN(
        sd.pipe, formula_scorer(), also={"red": (lambda p, t: [1e6 * x for x in reds(p, t)], 5.0)}, combine="rank"
    )(n=5, keep=5, **sd.arguments)
    assert scaled.seeds == up.seeds
    assert math.isnan(up.win_probability)  # of ranks there is none


def test_the_same_judge_asked_for_alignment(sd, tiny_qwen2_5_vl):
    """A closed question about prompt and picture, beside quality or instead of it."""
    align = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", question="alignment")
    best = BestOfN(sd.pipe, formula_scorer(), also={"align": (align, 0.5)})
    out = best(n=2, keep=2, **sd.arguments)
    for record in out.records:
        asked = align.score(record.picture, prompts="a lighthouse")[0].score
        assert record.extras["align"] == pytest.approx(asked, abs=1e-4)
        assert record.value == pytest.approx(record.score + 0.5 * asked, abs=1e-4)
    alone = BestOfN(sd.pipe, align)(n=2, keep=2, **sd.arguments)
    assert sorted(alone.scores) == pytest.approx(sorted(r.extras["align"] for r in out.records), abs=1e-4)
