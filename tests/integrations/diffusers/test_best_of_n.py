"""`BestOfN` on tiny random pipelines: right choice, right scores, the promised work."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_matrix import difference, make_alone
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import build
from tiny_pipelines.parts import picture
from tiny_pipelines.unets import control, sd_parts

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.metric import VisualQualityR1Score
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
# diffusers and its schedulers warn about their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def test_denoiser_rows_are_as_promised(sd):
    best = BestOfN(sd.pipe, formula_scorer(), batch_size=8)
    options = dict(sd.arguments, num_inference_steps=8, preview_at_ratio=0.4, survivors=4)
    rows = {s: best(n=8, strategy=s, **options).denoiser_rows for s in ("inplace", "restart")}
    # Two rows a step with guidance; steps 0 to int(0.4 * 8) for eight, then the rest or everything for four.
    assert rows == {"inplace": 2 * (4 * 8 + 4 * 4), "restart": 2 * (4 * 8 + 8 * 4)}
    assert best(n=8, **dict(options, preview_at_ratio=None)).denoiser_rows == 2 * 8 * 8


@pytest.mark.parametrize(("ratio", "rows"), [(0.4, [24, 12]), (0.5, [24, 16])])
def test_the_second_denoiser_of_wan_2_2_computes_only_its_own_steps(ratio, rows):
    """It has the last three of six steps; previews come just before it, or after its first step."""
    tiny = build("wan22")
    seen = {"transformer": 0, "transformer_2": 0}

    def counting(name):
        def count(module, args, kwargs):
            seen[name] += len(kwargs["hidden_states"])

        return count

    for name in seen:
        getattr(tiny.pipe, name).register_forward_pre_hook(counting(name), with_kwargs=True)
    out = BestOfN(tiny.pipe, formula_scorer())(n=4, preview_at_ratio=ratio, survivors=2, **tiny.arguments)
    assert list(seen.values()) == rows  # two rows a candidate and step, with guidance
    assert out.denoiser_rows == sum(rows)


@pytest.mark.parametrize(
    ("family", "scheduler", "settings", "options"),
    [
        ("sd", "DDIMScheduler", {}, {"eta": 1.0}),
        ("sd", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("flux", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ],
)
def test_schedulers_that_can_draw_noise(family, scheduler, settings, options):
    tiny = build(family, scheduler, **settings)
    arguments = tiny.arguments | options | {"output_type": "np"}
    best = BestOfN(tiny.pipe, formula_scorer(), batch_size=3)
    if "randn_like" in inspect.getsource(type(tiny.pipe.scheduler).step):  # older diffusers: nobody's seed
        with pytest.raises(UnsupportedError, match="global generator"):
            best(n=4, **arguments)
        return
    plain = best(n=4, keep=4, **arguments)
    for strategy in ("inplace", "restart"):
        pruned = best(n=4, preview_at_ratio=0.5, survivors=2, strategy=strategy, **arguments)
        for a, b in zip(pruned.records, plain.records, strict=True):
            assert not a.survived or difference(a.picture, b.picture) <= 1e-5
    assert difference(best(n=1, seeds=plain.seeds[:1], **arguments).images[0], plain.images[0]) <= 1e-5


def test_noise_that_no_seed_makes_again_is_refused(sd):
    class Drawing(DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            return super().step(model_output, timestep, sample + torch.randn_like(sample), return_dict=return_dict)

    sd.pipe.scheduler = Drawing.from_config(sd.pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match="Drawing draws noise from PyTorch's global generator"):
        BestOfN(sd.pipe, formula_scorer())(n=2, **sd.arguments)
    assert "step" not in vars(sd.pipe.scheduler)


def test_chunks_change_nothing(sd):
    outputs = [
        BestOfN(sd.pipe, formula_scorer(), batch_size=size)(
            n=5, keep=2, preview_at_ratio=0.5, survivors=3, **sd.arguments
        )
        for size in (5, 2, 1)
    ]
    for other in outputs[1:]:
        assert other.seeds == outputs[0].seeds
        assert [r.survived for r in other.records] == [r.survived for r in outputs[0].records]
        assert other.denoiser_rows == outputs[0].denoiser_rows
        assert difference(other.images[0], outputs[0].images[0]) <= 1  # of 255: a value next to a rounding edge


def test_scores_are_those_of_the_scorer_on_the_saved_pictures(sd, tiny_qwen2_5_vl, tmp_path):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu")
    for output_type in ("pil", "np", "pt"):
        out = BestOfN(sd.pipe, scorer)(n=3, keep=3, output_type=output_type, **sd.arguments)
        files = []
        for i, image in enumerate(out.images):
            array = image.permute(1, 2, 0).numpy() if output_type == "pt" else image
            saved = image if output_type == "pil" else Image.fromarray((array * 255).round().astype("uint8"))
            saved.save(tmp_path / f"{output_type}{i}.png")
            files.append(tmp_path / f"{output_type}{i}.png")
        again = scorer.score(files)
        assert [result.score for result in again] == out.scores
        assert out.scores == sorted(out.scores, reverse=True)
        assert float(out.distributions[0].mean) == out.scores[0]


def test_survivors_are_the_best_previews(sd):
    out = BestOfN(sd.pipe, formula_scorer())(n=6, keep=2, preview_at_ratio=0.5, survivors=0.5, **sd.arguments)
    previews = [record.preview_score for record in out.records]
    assert sorted(range(6), key=lambda i: -previews[i])[:3] == sorted(
        (i for i in range(6) if out.records[i].survived), key=lambda i: -previews[i]
    )
    assert formula_scorer().score(out.records[0].preview)[0].score == previews[0]
    assert [record.picture is None for record in out.records] == [not record.survived for record in out.records]
    assert len(out.images) == 2
    assert len(out.ranking) == 3


def test_ranking_tells_the_win_probability_and_ties(sd):
    out = BestOfN(sd.pipe, formula_scorer())(n=4, keep=4, **sd.arguments)
    assert 0.5 <= out.win_probability <= 1
    assert out.ranking[0].result.score == out.scores[0]
    twins = BestOfN(sd.pipe, formula_scorer())(n=2, seeds=[7, 7], **sd.arguments)
    assert twins.tied
    assert twins.win_probability == pytest.approx(0.5)
    assert math.isnan(BestOfN(sd.pipe, formula_scorer())(n=1, **sd.arguments).win_probability)


def test_lists_of_prompts_and_what_belongs_to_each(sd):
    best = BestOfN(sd.pipe, formula_scorer())
    common = {name: value for name, value in sd.arguments.items() if name != "prompt"}
    prompts, negatives = ["a cat", "a dog"], ["blur", "noise"]
    together = best(prompts, n=3, negative_prompt=negatives, **common)
    for prompt, negative, output in zip(prompts, negatives, together, strict=True):
        assert best(prompt, n=3, negative_prompt=negative, **common).scores == output.scores


def test_pictures_in_lists_are_those_of_each_prompt_unless_a_prompt_takes_several():
    red, grey = Image.new("RGB", (32, 32), "red"), picture()
    tiny = build("img2img")
    common = {name: value for name, value in tiny.arguments.items() if name not in ("prompt", "image")}
    best = BestOfN(tiny.pipe, formula_scorer())
    for text, image, out in zip("ab", (red, grey), best(["a", "b"], n=2, image=[red, grey], **common), strict=True):
        assert best(text, n=2, image=image, **common).scores == out.scores

    both = [control(cross_attention_dim=32, attention_head_dim=4) for _ in range(2)]
    pipe = diffusers.StableDiffusionControlNetPipeline(**sd_parts(), controlnet=both)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfN(pipe, formula_scorer())
    common |= {"height": 32, "width": 32}
    del common["strength"]
    alone = [best("a", n=2, image=images, **common).scores for images in ([red, grey], [grey, red])]
    assert alone[0] != alone[1]
    assert [out.scores for out in best(["a", "a"], n=2, image=[red, grey], **common)] == [alone[0]] * 2
    assert [out.scores for out in best(["a", "a"], n=2, image=[[red, grey], [grey, red]], **common)] == alone


def test_grid(sd):
    out = BestOfN(sd.pipe, formula_scorer())(n=3, keep=3, **sd.arguments)
    assert out.grid().size == (64, 2 * (32 + 14))
    assert out.grid(columns=3).size == (96, 32 + 14)
    corner = np.asarray(out.grid())[14:46, :32]
    assert np.array_equal(corner, np.asarray(out.images[0]))


def test_state_of_a_metric_is_untouched_unless_asked(sd):
    metric = VisualQualityR1Score(scorer=formula_scorer())
    BestOfN(sd.pipe, metric)(n=3, keep=2, preview_at_ratio=0.5, **sd.arguments)
    assert metric.update_count == 0
    out = BestOfN(sd.pipe, metric, update_metric=True)(n=3, keep=2, **sd.arguments)
    assert metric.update_count == 1
    assert float(metric.compute()) == pytest.approx(sum(out.scores) / 2, abs=1e-5)


@pytest.mark.parametrize("kind", ["seed", "seeds", "generator"])
def test_seeds(sd, kind):
    given = {
        "seed": 11,
        "seeds": [11, 12],
        "generator": [torch.Generator().manual_seed(11), torch.Generator().manual_seed(12)],
    }
    out = BestOfN(sd.pipe, formula_scorer())(n=2, **{kind: given[kind]}, **sd.arguments)
    assert sorted(out.records[i].seed for i in range(2)) == [11, 12]
    assert difference(make_alone(sd, out.seeds[0]), out.images[0]) <= 1


def test_video_is_scored_by_frames():
    tiny = build("wan")
    scorer = formula_scorer()
    out = BestOfN(tiny.pipe, scorer, frames=3)(n=2, output_type="pil", **tiny.arguments)
    assert len(out.images[0]) == 5
    assert scorer.backend.pictures == 2 * 3
    frames = [out.images[0][i] for i in (0, 2, 4)]
    assert out.scores[0] == pytest.approx(np.mean([r.score for r in scorer.score(frames)]), abs=1e-5)


def test_blanked_pictures_come_last(sd, monkeypatch):
    def blank_the_first(image, device, dtype):
        image = image.clone()
        image[0] = -1
        return image, [True] + [False] * (len(image) - 1)

    monkeypatch.setattr(sd.pipe, "run_safety_checker", blank_the_first)
    metric = VisualQualityR1Score(scorer=formula_scorer())
    out = BestOfN(sd.pipe, metric, update_metric=True)(n=3, keep=3, **sd.arguments)
    assert float(metric.compute()) == pytest.approx(sum(out.scores[:2]) / 2, abs=1e-5)
    assert math.isnan(out.scores[-1])
    assert out.seeds[-1] == 0
    assert "safety checker" in out.ranking[-1].result.error
    pruned = BestOfN(sd.pipe, formula_scorer())(n=3, preview_at_ratio=0.5, survivors=2, **sd.arguments)
    assert not pruned.records[0].survived
