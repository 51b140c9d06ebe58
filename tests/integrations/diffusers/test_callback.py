"""`VisualQualityR1Callback` in tiny random pipelines: previews, dropped candidates, stopped runs, a clean pipe."""

import gc
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers_matrix import difference
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import build, failing, offload
from tiny_pipelines.unets import sd_parts, unet

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError, VisualQualityR1Callback
from vqr1_metric.integrations.diffusers.decoding import DECODED
from vqr1_metric.integrations.diffusers.pruning import PRUNED
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

COUNTS = dict.fromkeys(("wan", "wan22"), "num_videos_per_prompt")
# Every family whose batch may be cut, and every scheduler, once.
PAIRS = [
    ("sd", "DDIMScheduler"),
    ("sd", "LCMScheduler"),
    ("sd", "TCDScheduler"),
    ("sd", "DDPMScheduler"),
    ("img2img", "EulerAncestralDiscreteScheduler"),
    ("controlnet", "PNDMScheduler"),
    ("controlnet", "DEISMultistepScheduler"),
    ("sdxl", "HeunDiscreteScheduler"),
    ("sdxl", "LMSDiscreteScheduler"),
    ("sdxl", "DPMSolverMultistepScheduler"),
    ("sdxl", "DPMSolverSinglestepScheduler"),
    ("sdxl", "EulerDiscreteScheduler"),
    ("sdxl_controlnet", "EulerDiscreteScheduler"),
    ("sd3", "FlowMatchHeunDiscreteScheduler"),
    ("flux", "FlowMatchEulerDiscreteScheduler"),
    ("flux2", "FlowMatchEulerDiscreteScheduler"),
    ("flux2_klein", "FlowMatchEulerDiscreteScheduler"),
    ("sana", "FlowMatchEulerDiscreteScheduler"),
    ("qwen_image", "FlowMatchEulerDiscreteScheduler"),
    ("wan", "UniPCMultistepScheduler"),
    ("wan22", "UniPCMultistepScheduler"),
]


def call(tiny, n, callback=None, family="sd", **options):
    """The pictures of n candidates with the seeds 0 to n - 1."""
    arguments = tiny.arguments | {"output_type": "np", COUNTS.get(family, "num_images_per_prompt"): n} | options
    if callback is not None:
        arguments |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": callback.tensor_inputs}
    output = tiny.pipe(generator=[torch.Generator().manual_seed(i) for i in range(n)], **arguments)
    return output.frames if hasattr(output, "frames") else output.images


def patched(pipe):
    """Is anything of the callback's still in the pipe?"""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return "step" in vars(pipe.scheduler) or any("_compiled_call_impl" in vars(module) for module in modules)


def test_it_is_a_pipeline_callback_and_records_every_candidate(sd):
    scorer = formula_scorer()
    callback = VisualQualityR1Callback(scorer, every=2)
    assert isinstance(callback, PipelineCallback)
    pictures = call(sd, 3, callback)
    assert [(r.step, r.candidate) for r in callback.records] == [(s, c) for s in (1, 3, 5) for c in range(3)]
    for record in callback.records:
        assert record.score == scorer.score(record.preview)[0].score
    assert difference(pictures, call(sd, 3)) == 0
    # After the last step the predicted clean picture is the picture.
    last = [record for record in callback.records if record.step == 5]
    for record, picture in zip(last, pictures, strict=True):
        assert difference(record.preview, (picture * 255).round()) <= 1
    assert not patched(sd.pipe)


def test_steps():
    tiny = build("sd")
    for options, steps in [
        ({"every": 1}, [1, 2, 3, 4, 5]),
        ({"every": 4}, [3]),
        ({"at_step": 1}, [1]),
        ({"at_ratio": 0.5}, [3]),
        ({"at_ratio": 0.0}, [1]),
    ]:
        callback = VisualQualityR1Callback(formula_scorer(), **options)
        call(tiny, 1, callback)
        assert [record.step for record in callback.records] == steps


@pytest.mark.parametrize(
    "family",
    [
        *("sd", "controlnet", "sdxl", "sdxl_controlnet", "sd3", "flux", "flux2", "flux2_klein", "sana", "qwen_image"),
        *("z_image", "wan", "wan22"),
    ],
)
def test_previews_are_what_the_pipe_itself_decodes(family):
    tiny = build(family)
    assert type(tiny.pipe).__name__ in DECODED
    tiny.arguments["output_type"] = "pil"
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    call(tiny, 2, callback, family, output_type="pil")
    arguments = dict(tiny.arguments)
    # A preview after three of six steps: BestOfN lets the pipe decode.
    reference = BestOfN(tiny.pipe, formula_scorer())(
        arguments.pop("prompt"), n=2, preview_at_ratio=0.5, survivors=1, **arguments
    )
    for record, candidate in zip(callback.records, reference.records, strict=True):
        pairs = (
            zip(record.preview, candidate.preview, strict=True)
            if family in COUNTS
            else [(record.preview, candidate.preview)]
        )
        assert max(difference(a, b) for a, b in pairs) <= 1


@pytest.mark.parametrize(("family", "scheduler"), PAIRS)
def test_dropping_candidates_leaves_the_others_as_they_were(family, scheduler):
    tiny = build(family, scheduler)
    everyone = call(tiny, 4, family=family)
    for keep in (2, 1):
        callback = VisualQualityR1Callback(formula_scorer(), at_ratio=0.5, keep=keep)
        pictures = call(tiny, 4, callback, family)
        scores = [record.score for record in callback.records]
        assert callback.kept == sorted(sorted(range(4), key=lambda i: -scores[i])[:keep])
        assert len(pictures) == keep
        for picture, candidate in zip(pictures, callback.kept, strict=True):
            assert difference(picture, everyone[candidate]) <= 1e-5
    assert not patched(tiny.pipe)


def test_pairs_hold_every_family_whose_batch_may_be_cut():
    assert {type(build(family).pipe).__name__ for family, _ in PAIRS} == PRUNED


def test_stochastic_ddim(sd):
    everyone = call(sd, 4, eta=1.0)
    callback = VisualQualityR1Callback(formula_scorer(), at_ratio=0.5, keep=2)
    pictures = call(sd, 4, callback, eta=1.0)
    assert difference(pictures, everyone[callback.kept]) <= 1e-5


def test_dropping_saves_denoiser_rows(sd):
    rows = []
    sd.pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    call(sd, 4, VisualQualityR1Callback(formula_scorer(), at_step=2, keep=1))
    assert rows == [8, 8, 8, 2, 2, 2]


def test_stopping_returns_the_previews(sd):
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, stop_below=4.99)
    steps = []
    sd.pipe.unet.register_forward_pre_hook(lambda module, args: steps.append(1))
    pictures = call(sd, 2, callback)
    assert callback.stopped
    assert sd.pipe._interrupt is False
    assert not patched(sd.pipe)
    assert len(steps) == 3
    for record, picture in zip(callback.records, pictures, strict=True):
        assert difference(record.preview, (picture * 255).round()) <= 1
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, stop_below=1.0)
    call(sd, 2, callback)
    assert not callback.stopped
    assert len(steps) == 3 + 6


def test_logs(sd):
    seen, scalars, wandb = [], [], []
    for log in (
        seen.append,
        SimpleNamespace(add_scalar=lambda *values: scalars.append(values)),
        SimpleNamespace(log=wandb.append),
    ):
        callback = VisualQualityR1Callback(formula_scorer(), at_step=2, log=log)
        call(sd, 2, callback)
    scores = [record.score for record in callback.records]
    expected = {"vqr1/best": max(scores), "vqr1/mean": sum(scores) / 2, "vqr1/candidates": 2}
    assert seen == wandb == [expected | {"step": 2}]
    assert scalars == [(name, value, 2) for name, value in expected.items()]


def test_a_tensorboard_log(sd, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        callback = VisualQualityR1Callback(formula_scorer(), every=2, log=writer)
        call(sd, 2, callback)
    log = events.EventAccumulator(str(tmp_path)).Reload()
    best = [max(r.score for r in callback.records if r.step == step) for step in (1, 3, 5)]
    assert [(e.step, e.value) for e in log.Scalars("vqr1/best")] == [
        (step, pytest.approx(score)) for step, score in zip((1, 3, 5), best, strict=True)
    ]


@pytest.mark.parametrize(
    "kind", [pytest.param("compiled", marks=pytest.mark.slow), "model offload", "group offload", "bfloat16"]
)
def test_dropping_candidates_of_other_kinds_of_pipes(sd, kind):
    if kind == "compiled":
        sd.pipe.unet.compile(backend="eager")
    elif kind == "bfloat16":
        sd.pipe.to(torch.bfloat16)
    else:
        offload(sd.pipe, kind)
    compiled = vars(sd.pipe.unet).get("_compiled_call_impl")
    everyone = call(sd, 4)
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, keep=2)
    pictures = call(sd, 4, callback)
    assert len(callback.kept) == 2
    # In half precision the number of rows changes the rounding.
    assert difference(pictures, everyone[callback.kept]) <= (0.02 if kind == "bfloat16" else 1e-5)
    assert vars(sd.pipe.unet).get("_compiled_call_impl") is compiled
    assert difference(call(sd, 4), everyone) == 0


def test_previews_of_a_decoder_that_overflows_in_half_precision():
    tiny = build("sdxl")
    tiny.pipe.to(torch.float16)
    tiny.pipe.vae.register_to_config(force_upcast=True)
    used = []
    tiny.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: used.append(args[0].dtype))
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    call(tiny, 2, callback)
    assert used[:2] == [torch.float32] * 2
    assert tiny.pipe.vae.dtype == torch.float16
    assert len(callback.records) == 2


def test_among_other_callbacks(sd):
    class Other(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012 (as in diffusers' own)
        steps = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.steps += 1
            return dict(callback_kwargs)

    first, callback, last = Other(), VisualQualityR1Callback(formula_scorer(), at_step=2, keep=2), Other()
    everyone = call(sd, 4)
    pictures = call(sd, 4, MultiPipelineCallbacks([first, callback, last]))
    assert first.steps == last.steps == 6
    assert difference(pictures, everyone[callback.kept]) <= 1e-5


def test_a_real_model_scores_previews_as_pictures(sd, tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu")
    callback = VisualQualityR1Callback(SimpleNamespace(scorer=scorer), at_step=3)
    call(sd, 2, callback)
    assert [r.score for r in callback.records] == [s.score for s in scorer.score([r.preview for r in callback.records])]


@pytest.mark.parametrize("failing_call", [3, 5])
def test_pipe_is_left_as_found_after_an_exception(sd, failing_call):
    everyone = call(sd, 4)
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, keep=2)
    with failing(sd.pipe.unet, failing_call), pytest.raises(RuntimeError, match="out of memory") as caught:
        call(sd, 4, callback)
    # Even while the exception, and with it the interrupted call, is alive: another batch passes untouched.
    assert difference(call(sd, 2), everyone[:2]) <= 1e-5
    del caught
    gc.collect()
    assert not patched(sd.pipe)
    assert difference(call(sd, 4), everyone) == 0
    pictures = call(sd, 4, callback)
    assert difference(pictures, everyone[callback.kept]) <= 1e-5


def test_an_exception_that_is_forgotten_late_leaves_the_next_run_alone(sd):
    everyone = call(sd, 4)
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, keep=2)
    kept = []
    with failing(sd.pipe.unet, 5), pytest.raises(RuntimeError, match="out of memory") as caught:
        call(sd, 4, callback)
    kept.append(caught._excinfo)
    del caught
    steps = []

    def forget(*_):
        steps.append(1)
        if len(steps) == 5:
            kept.clear()
            gc.collect()

    sd.pipe.unet.register_forward_pre_hook(forget)
    pictures = call(sd, 4, callback)
    assert difference(pictures, everyone[callback.kept]) <= 1e-5
    assert not patched(sd.pipe)


def test_within_best_of_n(sd):
    plain = BestOfN(sd.pipe, formula_scorer())(n=4, **sd.arguments)
    callback = VisualQualityR1Callback(formula_scorer(), every=2)
    out = BestOfN(sd.pipe, formula_scorer())(n=4, callback_on_step_end=callback, **sd.arguments)
    assert (out.scores, out.seeds) == (plain.scores, plain.seeds)
    assert len(callback.records) == 4 * 3
    pruning = VisualQualityR1Callback(formula_scorer(), at_step=2, keep=2)
    with pytest.raises(UnsupportedError, match="cannot be passed to BestOfN"):
        BestOfN(sd.pipe, formula_scorer())(n=4, callback_on_step_end=pruning, **sd.arguments)
    gc.collect()
    assert not patched(sd.pipe)


def test_pipelines_that_do_not_stop_are_refused(sd):
    parts = sd_parts() | {"unet": unet(time_cond_proj_dim=8), "scheduler": diffusers.LCMScheduler(clip_sample=False)}
    lcm = SimpleNamespace(pipe=diffusers.LatentConsistencyModelPipeline(**parts), arguments=sd.arguments)
    lcm.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UnsupportedError, match="cannot be interrupted"):
        call(lcm, 2, VisualQualityR1Callback(formula_scorer(), at_step=2, stop_below=4.99))
    callback = VisualQualityR1Callback(formula_scorer(), every=2)
    pictures = call(lcm, 2, callback)
    for record, picture in zip(callback.records[-2:], pictures, strict=True):
        assert difference(record.preview, (picture * 255).round()) <= 1

    class Deaf(type(sd.pipe)):  # it has the property and does not ask it
        interrupt = False

    deaf = Deaf(**sd.pipe.components, requires_safety_checker=False)
    callback = VisualQualityR1Callback(
        formula_scorer(), at_step=2, stop_below=4.99, decode=lambda pipe, latents: [Image.new("RGB", (32, 32))] * 2
    )
    with pytest.raises(UnsupportedError, match="Deaf cannot be interrupted"):
        call(SimpleNamespace(pipe=deaf, arguments=sd.arguments), 2, callback)
    assert not patched(deaf)


def test_bad_arguments(sd):
    scorer = formula_scorer()
    for error, match, options in [
        (ValueError, "exactly one of", {}),
        (ValueError, "exactly one of", {"every": 2, "at_step": 3}),
        (ValueError, "at_step of at least 1", {"at_step": 0}),
        (ValueError, "every of at least 1", {"every": 0}),
        (ValueError, "at_ratio in", {"at_ratio": 1.0}),
        (ValueError, "keep of at least 1", {"every": 2, "keep": 0}),
        (TypeError, "log to be", {"every": 2, "log": 3}),
    ]:
        with pytest.raises(error, match=match):
            VisualQualityR1Callback(scorer, **options)
    with pytest.raises(TypeError, match="a metric with a scorer"):
        VisualQualityR1Callback(object(), every=2)
    for steps, options in [(6, {"at_step": 6}), (6, {"every": 7}), (1, {"every": 1}), (1, {"at_ratio": 0.5})]:
        with pytest.raises(ValueError, match=f"within the {steps} steps of this run"):
            call(sd, 1, VisualQualityR1Callback(scorer, **options), num_inference_steps=steps)
    with pytest.raises(ValueError, match="keep of at most the 2 candidates"):
        call(sd, 2, VisualQualityR1Callback(scorer, at_step=2, keep=3))
    with pytest.raises(ValueError, match="Expected 2 pictures from decode"):
        call(sd, 2, VisualQualityR1Callback(scorer, at_step=2, decode=lambda pipe, latents: []))
    with pytest.raises(ValueError, match="one prompt a call"):
        sd.pipe(
            **(sd.arguments | {"prompt": ["a cat", "a dog"]}),
            callback_on_step_end=VisualQualityR1Callback(scorer, at_step=2, keep=1),
        )
    assert not patched(sd.pipe)


def test_a_check_before_the_run(sd):
    scorer = formula_scorer()
    for family, scheduler, match, options in [
        ("pixart", None, "PixArtSigmaPipeline has no callback_on_step_end", {}),
        ("sdxl_modular", None, "VisualQualityR1Block", {}),
        ("sd", "KDPM2DiscreteScheduler", "but got KDPM2DiscreteScheduler", {}),
        ("ltx", None, "no preview inside a run of LTXPipeline", {}),
        ("z_image", None, "not known to be exact with ZImagePipeline", {"keep": 1}),
    ]:
        with pytest.raises(UnsupportedError, match=match):
            VisualQualityR1Callback(scorer, every=2, **options).check(build(family, scheduler).pipe)
    with pytest.raises(ValueError, match="no-such-folder"):
        VisualQualityR1Callback(QualityScorer("./no-such-folder", device="cpu"), every=2).check(sd.pipe)
    VisualQualityR1Callback(scorer, every=2, keep=1).check(sd.pipe)
    VisualQualityR1Callback(scorer, every=2, decode=lambda pipe, latents: []).check(build("ltx").pipe)
    # The same errors end a run after its first step.
    steps = []
    tiny = build("sd", "KDPM2DiscreteScheduler")
    tiny.pipe.unet.register_forward_pre_hook(lambda module, args: steps.append(1))
    with pytest.raises(UnsupportedError, match="clean prediction"):
        call(tiny, 1, VisualQualityR1Callback(scorer, at_step=3))
    assert len(steps) == 1


def test_missing_latents():
    tiny = build("flux")
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        tiny.pipe(**tiny.arguments, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_noise_of_one_generator_for_all_cannot_be_cut(sd):
    for options in ({"eta": 1.0, "generator": torch.Generator()}, {"eta": 1.0, "generator": None}):
        callback = VisualQualityR1Callback(formula_scorer(), at_step=2, keep=1)
        with pytest.raises(UnsupportedError, match="draws noise at each step"):
            sd.pipe(num_images_per_prompt=2, callback_on_step_end=callback, **options, **sd.arguments)
    flux = build("flux", "FlowMatchLCMScheduler")  # the pipe does not pass its generators on
    with pytest.raises(UnsupportedError, match="FluxPipeline passes to it"):
        call(flux, 2, VisualQualityR1Callback(formula_scorer(), at_step=2, keep=1))


def test_pipelines_whose_batch_must_not_be_cut():
    for family in ("inpaint", "z_image"):
        tiny = build(family)
        with pytest.raises(UnsupportedError, match="not known to be exact"):
            call(tiny, 2, VisualQualityR1Callback(formula_scorer(), at_step=2, keep=1))


def test_pipelines_without_a_known_decoder(sd):
    class Other(type(sd.pipe)):
        pass

    pipe = Other(**sd.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tiny = SimpleNamespace(pipe=pipe, arguments=sd.arguments)
    with pytest.raises(UnsupportedError, match="use BestOfN"):
        call(tiny, 1, VisualQualityR1Callback(formula_scorer(), at_step=2))

    def decode(pipe: DiffusionPipeline, latents):
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(images.detach(), output_type="pil")

    own = VisualQualityR1Callback(formula_scorer(), at_step=2, decode=decode)
    call(tiny, 2, own)
    known = VisualQualityR1Callback(formula_scorer(), at_step=2)
    call(sd, 2, known)
    assert [r.score for r in own.records] == pytest.approx([r.score for r in known.records], abs=0.02)
