"""`BestOfN` on tiny random pipelines: right pictures, right scores, the promised work, and a pipe left as it was."""

import math

import numpy as np
import pytest
import torch
from diffusers_matrix import check, difference, make_alone
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import FAMILIES, build

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.integrations.diffusers.support import CARRIES_ON
from vqr1_metric.metric import VisualQualityR1Score
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
# diffusers and its schedulers warn about their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

# Every family once, every scheduler once; tests/diffusers_matrix.py has the rest.
PAIRS = [
    ("sd", "DDIMScheduler"),
    ("sd", "HeunDiscreteScheduler"),
    ("sd", "DEISMultistepScheduler"),
    ("sd", "LCMScheduler"),
    ("sd", "TCDScheduler"),
    ("img2img", "EulerAncestralDiscreteScheduler"),
    ("inpaint", "DDPMScheduler"),
    ("inpaint9", "UniPCMultistepScheduler"),
    ("controlnet", "PNDMScheduler"),
    ("upscale", "EulerDiscreteScheduler"),
    ("sdxl", "LMSDiscreteScheduler"),
    ("sdxl", "DPMSolverMultistepScheduler"),
    ("sdxl_img2img", "DPMSolverMultistepScheduler"),
    ("sdxl_inpaint", "EulerDiscreteScheduler"),
    ("flux_img2img", "FlowMatchEulerDiscreteScheduler"),
    ("pixart_alpha", "DPMSolverMultistepScheduler"),
    ("sdxl_modular", "EulerAncestralDiscreteScheduler"),
    ("sd3", "FlowMatchHeunDiscreteScheduler"),
    ("flux", "FlowMatchLCMScheduler"),
    ("flux2", "FlowMatchEulerDiscreteScheduler"),
    ("pixart", "DPMSolverSinglestepScheduler"),
    ("sana", "FlowMatchEulerDiscreteScheduler"),
    ("qwen_image", "FlowMatchEulerDiscreteScheduler"),
    ("z_image", "FlowMatchEulerDiscreteScheduler"),
    ("ltx", "FlowMatchEulerDiscreteScheduler"),
    ("wan", "FlowMatchEulerDiscreteScheduler"),
]


@pytest.fixture
def sd():
    return build("sd")


def state_of(pipe):
    """What a run could leave behind: patched methods, hooks, scheduler settings, flags."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    hooks = {
        n: (len(m._forward_pre_hooks), len(m._forward_hooks), "_compiled_call_impl" in vars(m))
        for n, m in modules.items()
    }
    scheduler = {k: v.tolist() if isinstance(v, torch.Tensor) else repr(v) for k, v in vars(pipe.scheduler).items()}
    return hooks, scheduler, getattr(pipe, "_interrupt", False)


def test_pairs_hold_every_family():
    assert {family for family, _ in PAIRS} == set(FAMILIES)


def test_only_tested_pipelines_carry_on():
    assert {type(build(family).pipe).__name__ for family in FAMILIES} == CARRIES_ON


@pytest.mark.parametrize(("family", "scheduler"), PAIRS)
def test_survivors_are_the_pictures_of_an_unpruned_run_and_of_their_seeds(family, scheduler):
    checked = check(family, scheduler)
    assert checked.exact, checked
    assert checked.candidates > 0.02, "candidates so alike that a mix-up would not show"
    plain, restart, inplace = checked.rows
    assert inplace < plain
    assert inplace < restart


def test_denoiser_rows_are_as_promised(sd):
    best = BestOfN(sd.pipe, formula_scorer(), batch_size=8)
    options = dict(sd.arguments, num_inference_steps=8, preview_at_ratio=0.4, survivors=4)
    rows = {s: best(n=8, strategy=s, **options).denoiser_rows for s in ("inplace", "restart")}
    # Two rows a step with guidance; three steps for eight, then the rest or everything for four.
    assert rows == {"inplace": 2 * (3 * 8 + 5 * 4), "restart": 2 * (3 * 8 + 8 * 4)}
    assert best(n=8, **dict(options, preview_at_ratio=None)).denoiser_rows == 2 * 8 * 8


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
    plain = best(n=4, keep=4, **arguments)
    for strategy in ("inplace", "restart"):
        pruned = best(n=4, preview_at_ratio=0.5, survivors=2, strategy=strategy, **arguments)
        for a, b in zip(pruned.records, plain.records, strict=True):
            assert not a.survived or difference(a.picture, b.picture) <= 1e-5
    assert difference(best(n=1, seeds=plain.seeds[:1], **arguments).images[0], plain.images[0]) <= 1e-5


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
    out = BestOfN(sd.pipe, formula_scorer())(n=3, keep=3, **sd.arguments)
    assert math.isnan(out.scores[-1])
    assert out.seeds[-1] == 0
    assert "safety checker" in out.ranking[-1].result.error
    pruned = BestOfN(sd.pipe, formula_scorer())(n=3, preview_at_ratio=0.5, survivors=2, **sd.arguments)
    assert not pruned.records[0].survived


# -------------------------------------------------------------------- the pipe afterwards


@pytest.mark.parametrize("strategy", ["restart", "inplace"])
def test_pipe_is_left_as_found(sd, strategy):
    before = make_alone(sd, 3)
    state = state_of(sd.pipe)
    BestOfN(sd.pipe, formula_scorer())(n=3, preview_at_ratio=0.5, strategy=strategy, **sd.arguments)
    assert state_of(sd.pipe) == state
    assert difference(make_alone(sd, 3), before) == 0


@pytest.mark.parametrize("failing_call", [1, 3, 5])
def test_pipe_is_left_as_found_after_an_exception(sd, failing_call):
    before = make_alone(sd, 3)
    state = state_of(sd.pipe)
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == failing_call:
            raise RuntimeError("out of memory")

    hook = sd.pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        BestOfN(sd.pipe, formula_scorer())(n=4, preview_at_ratio=0.5, **sd.arguments)
    hook.remove()
    assert state_of(sd.pipe) == state
    assert difference(make_alone(sd, 3), before) == 0


@pytest.mark.parametrize("wrapper", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_denoisers(sd, wrapper):
    arguments = dict(sd.arguments, n=4, preview_at_ratio=0.5, survivors=2)
    plain = BestOfN(sd.pipe, formula_scorer())(**arguments)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    if wrapper:
        sd.pipe.unet = compiled = torch.compile(sd.pipe.unet, backend=backend)
    else:
        sd.pipe.unet.compile(backend=backend)
        compiled = vars(sd.pipe.unet)["_compiled_call_impl"]
    out = BestOfN(sd.pipe, formula_scorer())(**arguments)
    assert graphs
    assert (sd.pipe.unet if wrapper else vars(sd.pipe.unet)["_compiled_call_impl"]) is compiled
    assert (out.strategy, out.denoiser_rows, out.seeds) == ("inplace", plain.denoiser_rows, plain.seeds)
    assert difference(out.images[0], plain.images[0]) <= 1


def test_offloading_hooks_and_slicing(sd):
    from accelerate import cpu_offload_with_hook

    arguments = dict(sd.arguments, n=4, preview_at_ratio=0.5, survivors=2)
    plain = BestOfN(sd.pipe, formula_scorer())(**arguments)
    cpu_offload_with_hook(sd.pipe.unet, execution_device="cpu")
    sd.pipe.vae.enable_slicing()
    sd.pipe.enable_attention_slicing()
    hook = sd.pipe.unet._hf_hook
    sliced = BestOfN(sd.pipe, formula_scorer())(**arguments)
    assert sd.pipe.unet._hf_hook is hook
    assert sliced.seeds == plain.seeds
    assert difference(sliced.images[0], plain.images[0]) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(sd, dtype):
    sd.pipe.to(dtype)
    arguments = dict(sd.arguments, n=4, survivors=2, output_type="np")
    plain = BestOfN(sd.pipe, formula_scorer())(**arguments)
    pruned = BestOfN(sd.pipe, formula_scorer())(preview_at_ratio=0.5, strategy="inplace", **arguments)
    for a, b in zip(pruned.records, plain.records, strict=True):
        assert not a.survived or difference(a.picture, b.picture) < 0.02  # batch size changes half-precision kernels


# -------------------------------------------------------------------- refusals


def test_bad_arguments_are_refused_before_any_denoising(sd):
    def fail(*_):
        raise AssertionError("denoised")

    sd.pipe.unet.register_forward_pre_hook(fail)
    best = BestOfN(sd.pipe, formula_scorer())
    prompt = sd.arguments
    for error, match, arguments in [
        (ValueError, "n of at least 1", {"n": 0}),
        (ValueError, "keep from 1 to n=2", {"n": 2, "keep": 3}),
        (ValueError, "preview_at_ratio between 0 and 1", {"preview_at_ratio": 1.0}),
        (ValueError, "preview_at_ratio between 0 and 1", {"preview_at_ratio": -0.5}),
        (ValueError, "leave a step to run", {"preview_at_ratio": 0.5, "num_inference_steps": 1}),
        (ValueError, "from keep=3 to n=4 survivors", {"n": 4, "keep": 3, "survivors": 2, "preview_at_ratio": 0.5}),
        (ValueError, "survivors as a share", {"survivors": 1.5, "preview_at_ratio": 0.5}),
        (ValueError, "strategy to be auto", {"strategy": "fast"}),
        (ValueError, "one seed for each of n=8", {"seeds": [1]}),
        (ValueError, "one generator for each of n=4", {"n": 4, "generator": [torch.Generator()] * 3}),
        (ValueError, "one generator for each of n=4", {"n": 4, "generator": torch.Generator()}),
        (ValueError, "latents", {"latents": torch.zeros(8, 4, 16, 16)}),
        (ValueError, "output_type", {"output_type": "latent"}),
        (TypeError, "takes no colour", {"colour": "red"}),
        (TypeError, "Expected n instead", {"num_images_per_prompt": 4}),
    ]:
        with pytest.raises(error, match=match):
            best(**(prompt | arguments))
    with pytest.raises(ValueError, match="at least one prompt"):
        best([])
    used = torch.Generator().manual_seed(0)
    torch.randn(1, generator=used)
    with pytest.raises(ValueError, match="fresh generators"):
        best(n=1, generator=[used], **prompt)


def test_a_model_that_does_not_load_fails_before_any_denoising(sd, tiny_qwen2_5_vl):
    sd.pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("denoised"))
    with pytest.raises(ValueError, match="no-such-folder"):
        BestOfN(sd.pipe, QualityScorer("./no-such-folder", device="cpu"))(n=1, **sd.arguments)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            BestOfN(sd.pipe, QualityScorer(str(tiny_qwen2_5_vl), device="cuda"))(n=1, **sd.arguments)


def test_things_that_are_no_pipe_or_no_metric(sd):
    with pytest.raises(ValueError, match="a diffusers pipeline with a scheduler"):
        BestOfN(lambda prompt: None, formula_scorer())
    with pytest.raises(ValueError, match="has none"):
        BestOfN(_Empty(sd.pipe.scheduler), formula_scorer())
    with pytest.raises(TypeError, match="a metric with a scorer"):
        BestOfN(sd.pipe, object())
    with pytest.raises(TypeError, match="a metric to update"):
        BestOfN(sd.pipe, formula_scorer(), update_metric=True)


class _Empty:
    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __call__(self, generator=None):
        return None


def test_what_is_not_known_to_be_exact_restarts_or_is_refused(sd):
    from diffusers import StableDiffusionPipeline

    class Changed(StableDiffusionPipeline):
        """Somebody's own pipeline."""

    arguments = dict(sd.arguments, n=2, preview_at_ratio=0.5)
    changed = Changed(**sd.pipe.components, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    best = BestOfN(changed, formula_scorer())
    assert best.batch_size == 1
    assert best(**arguments).strategy == "restart"
    with pytest.raises(UnsupportedError, match="Changed was not tested"):
        best(strategy="inplace", **arguments)

    def callback(pipe, step, timestep, kwargs):
        return kwargs

    best = BestOfN(sd.pipe, formula_scorer())
    assert best(callback_on_step_end=callback, **arguments).strategy == "restart"
    with pytest.raises(UnsupportedError, match="callback of yours"):
        best(strategy="inplace", callback_on_step_end=callback, **arguments)


def test_cached_activations_restart():
    from diffusers import FirstBlockCacheConfig

    flux = build("flux")
    best = BestOfN(flux.pipe, formula_scorer())
    assert best(n=2, preview_at_ratio=0.5, **flux.arguments).strategy == "inplace"
    flux.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert best(n=2, preview_at_ratio=0.5, **flux.arguments).strategy == "restart"
    with pytest.raises(UnsupportedError, match="caches activations"):
        best(n=2, preview_at_ratio=0.5, strategy="inplace", **flux.arguments)


def test_scheduler_without_clean_prediction():
    tiny = build("sd", "KDPM2DiscreteScheduler")
    best = BestOfN(tiny.pipe, formula_scorer())
    with pytest.raises(UnsupportedError, match="KDPM2DiscreteScheduler"):
        best(n=2, preview_at_ratio=0.5, **tiny.arguments)
    assert len(best(n=2, keep=2, **tiny.arguments).images) == 2


@pytest.mark.slow
def test_full_matrix():
    from diffusers_matrix import table

    text = table()
    print(text)
    assert "(!)" not in text
    assert text.count("| DDIM ") == 11
