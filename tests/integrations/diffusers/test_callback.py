"""`VisualQualityR1Callback` in tiny pipelines: previews, stopped runs, failures that end nothing, a clean pipe."""

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

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError, VisualQualityR1Callback
from vqr1_metric.integrations.diffusers.tested import TESTED
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

#: Families of one picture from a text or a picture whose latents are decoded here.
DECODED = ["sd", "lcm", "img2img", "inpaint9", "controlnet", "controlnet_img2img", "pix2pix", "sdxl",
           "sdxl_controlnet", "sdxl_controlnet_img2img", "sd3", "flux", "flux_fill", "flux_kontext", "flux2",
           "flux2_klein", "sana", "qwen_image", "qwen_edit", "z_image", "wan", "wan22"]  # fmt: skip
COUNTS = dict.fromkeys(("wan", "wan22"), "num_videos_per_prompt")


def call(tiny, n, callback=None, family="sd", **options):
    """The pictures of n candidates with the seeds 0 to n - 1."""
    arguments = tiny.arguments | {"output_type": "np", COUNTS.get(family, "num_images_per_prompt"): n} | options
    if callback is not None:
        arguments |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": callback.tensor_inputs}
    output = tiny.pipe(generator=[torch.Generator().manual_seed(i) for i in range(n)], **arguments)
    return output.frames if hasattr(output, "frames") else output.images


def patched(pipe):
    """Is anything of the callback's still in the pipe, its scheduler or its models?"""
    kind = type(pipe.scheduler)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    stood_in = any(type(part).__name__ == "StandIn" for part in vars(pipe).values())
    return (
        getattr(diffusers, kind.__name__) is not kind
        or "step" in vars(pipe.scheduler)
        or stood_in
        or any("_compiled_call_impl" in vars(module) or "forward" in vars(module) for module in modules)
    )


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


@pytest.mark.parametrize("family", DECODED)
def test_previews_are_what_the_pipe_itself_decodes(family):
    tiny = build(family)
    tiny.arguments["output_type"] = "pil"
    if family in ("inpaint9", "flux_fill"):  # each candidate's encoding from its own generator, as BestOfN asks for it
        tiny.arguments |= {name: [tiny.arguments[name]] * 2 for name in ("image", "mask_image")}
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    call(tiny, 2, callback, family, output_type="pil")
    arguments = dict(tiny.arguments)
    # The same step: BestOfN lets the pipe decode.
    arguments |= {name: value[:1] for name, value in arguments.items() if isinstance(value, list)}
    reference = BestOfN(tiny.pipe, formula_scorer())(
        arguments.pop("prompt"), n=2, preview_at_ratio=0.4, survivors=1, **arguments
    )
    for record, candidate in zip(callback.records, reference.records, strict=True):
        pairs = (
            zip(record.preview, candidate.preview, strict=True)
            if family in COUNTS
            else [(record.preview, candidate.preview)]
        )
        assert max(difference(a, b) for a, b in pairs) <= 1


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
def test_other_kinds_of_pipes(sd, kind):
    if kind == "compiled":
        sd.pipe.unet.compile(backend="eager")
    elif kind == "bfloat16":
        sd.pipe.to(torch.bfloat16)
    else:
        offload(sd.pipe, kind)
    compiled = vars(sd.pipe.unet).get("_compiled_call_impl")
    plain = call(sd, 4)
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    assert difference(call(sd, 4, callback), plain) == 0
    assert len(callback.records) == 4
    assert vars(sd.pipe.unet).get("_compiled_call_impl") is compiled
    assert difference(call(sd, 4), plain) == 0


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

    first, callback, last = Other(), VisualQualityR1Callback(formula_scorer(), at_step=2), Other()
    plain = call(sd, 4)
    pictures = call(sd, 4, MultiPipelineCallbacks([first, callback, last]))
    assert first.steps == last.steps == 6
    assert len(callback.records) == 4
    assert difference(pictures, plain) == 0


def test_a_real_model_scores_previews_as_pictures(sd, tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu")
    callback = VisualQualityR1Callback(SimpleNamespace(scorer=scorer), at_step=3)
    call(sd, 2, callback)
    assert [r.score for r in callback.records] == [s.score for s in scorer.score([r.preview for r in callback.records])]


@pytest.mark.parametrize("failing_call", [3, 5])
@pytest.mark.parametrize("options", [{"at_step": 2}, {"every": 1}])
def test_pipe_is_left_as_found_after_an_exception(sd, failing_call, options):
    plain = call(sd, 4, eta=1.0)
    callback = VisualQualityR1Callback(formula_scorer(), **options)
    with failing(sd.pipe.unet, failing_call), pytest.raises(RuntimeError, match="out of memory") as caught:
        call(sd, 4, callback, eta=1.0)
    # Even while the exception, and with it the interrupted call, is alive: the same and other batches pass untouched.
    assert difference(call(sd, 4, eta=1.0), plain) == 0
    assert difference(call(sd, 2, eta=1.0), plain[:2]) <= 1e-5
    del caught
    gc.collect()
    assert not patched(sd.pipe)
    pictures = call(sd, 4, callback, eta=1.0)
    assert callback.failure is None
    assert callback.records
    assert difference(pictures, plain) == 0


def test_an_exception_that_nobody_keeps_leaves_nothing(sd):
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    with failing(sd.pipe.unet, 3), pytest.raises(RuntimeError, match="out of memory"):
        call(sd, 4, callback)
    gc.collect()
    assert not patched(sd.pipe)


def test_within_best_of_n(sd):
    plain = BestOfN(sd.pipe, formula_scorer())(n=4, **sd.arguments)
    callback = VisualQualityR1Callback(formula_scorer(), every=2)
    out = BestOfN(sd.pipe, formula_scorer())(n=4, callback_on_step_end=callback, **sd.arguments)
    assert (out.scores, out.seeds) == (plain.scores, plain.seeds)
    assert len(callback.records) == 4 * 3
    assert not patched(sd.pipe)


def test_the_list_of_decoded_families_is_the_table_of_names():
    named = {name for name, flags in TESTED.items() if "decodes" in flags.split()}
    ours = {type(build(family).pipe).__name__ for family in DECODED}
    assert named - ours == {"StableDiffusionXLModularPipeline"}  # which test_block.py has
    assert ours <= named


def test_pipelines_that_do_not_stop_say_so(sd):
    lcm = build("lcm")
    callback = VisualQualityR1Callback(formula_scorer(), every=2, stop_below=4.99)
    with pytest.raises(UnsupportedError, match="cannot be interrupted"):
        callback.check(lcm.pipe)
    plain = call(lcm, 2)
    with pytest.warns(UserWarning, match="will not be stopped"):
        pictures = call(lcm, 2, callback)
    assert difference(pictures, plain) == 0
    assert not callback.stopped
    for record, picture in zip(callback.records[-2:], pictures, strict=True):
        assert difference(record.preview, (picture * 255).round()) <= 1

    class Deaf(type(sd.pipe)):  # it has the property and does not ask it
        interrupt = False

    deaf = Deaf(**sd.pipe.components, requires_safety_checker=False)
    white = [Image.new("RGB", (32, 32), "white")] * 2
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2, stop_below=4.99, decode=lambda *_: white)
    with pytest.raises(UnsupportedError, match="Deaf cannot be interrupted"):
        call(SimpleNamespace(pipe=deaf, arguments=sd.arguments), 2, callback)
    assert not patched(deaf)


def test_bad_arguments():
    scorer = formula_scorer()
    for error, match, options in [
        (ValueError, "exactly one of", {}),
        (ValueError, "exactly one of", {"every": 2, "at_step": 3}),
        (ValueError, "at_step of at least 1", {"at_step": 0}),
        (ValueError, "every of at least 1", {"every": 0}),
        (ValueError, "at_ratio in", {"at_ratio": 1.0}),
        (TypeError, "BestOfN", {"every": 2, "keep": 2}),
        (TypeError, "log to be", {"every": 2, "log": 3}),
    ]:
        with pytest.raises(error, match=match):
            VisualQualityR1Callback(scorer, **options)
    with pytest.raises(TypeError, match="a metric with a scorer"):
        VisualQualityR1Callback(object(), every=2)


class Broken:
    """A scorer that fails when it is asked, or when it is loaded."""

    def __init__(self, loads=True):
        self.loads = loads

    @property
    def backend(self):
        if not self.loads:
            raise OSError("no weights")
        return self

    def score(self, images):
        raise RuntimeError("CUDA out of memory")


def failing_log(values):
    raise ConnectionError("no network")


@pytest.mark.parametrize(
    ("scorer", "options", "steps", "match"),
    [
        (formula_scorer(), {"at_step": 6}, 6, "within the 6 steps of this run"),
        (formula_scorer(), {"every": 7}, 6, "within the 6 steps of this run"),
        (formula_scorer(), {"every": 1}, 1, "within the 1 steps of this run"),
        (formula_scorer(), {"at_ratio": 0.5}, 1, "within the 1 steps of this run"),
        (formula_scorer(), {"at_step": 2, "decode": lambda *_: []}, 6, "Expected 2 pictures from decode"),
        (formula_scorer(), {"at_step": 2, "decode": lambda *_: 1 / 0}, 6, "division by zero"),
        (formula_scorer(), {"at_step": 2, "log": failing_log}, 6, "no network"),
        (Broken(), {"at_step": 2, "stop_below": 4.9}, 6, "CUDA out of memory"),
        (Broken(loads=False), {"at_step": 2}, 6, "no weights"),
    ],
)
def test_what_fails_is_a_warning_and_the_run_goes_on(sd, scorer, options, steps, match):
    plain = call(sd, 2, num_inference_steps=steps)
    callback = VisualQualityR1Callback(scorer, **options)
    with pytest.warns(UserWarning, match=match) as warned:
        pictures = call(sd, 2, callback, num_inference_steps=steps)
    assert len([w for w in warned if match in str(w.message)]) == 1
    assert difference(pictures, plain) == 0
    assert not callback.stopped
    assert not patched(sd.pipe)


@pytest.mark.parametrize(
    ("family", "scheduler", "match"),
    [("sd", "IPNDMScheduler", "but got IPNDMScheduler"), ("ltx", None, "no preview inside a run of LTXPipeline")],
)
def test_what_is_not_known_is_a_warning_and_the_run_goes_on(family, scheduler, match):
    tiny = build(family, scheduler)
    options = {"family": "wan" if family == "ltx" else family}
    plain = call(tiny, 2, **options)
    callback = VisualQualityR1Callback(formula_scorer(), every=2)
    with pytest.raises(UnsupportedError, match=match):
        callback.check(tiny.pipe)
    with pytest.warns(UserWarning, match=match):
        pictures = call(tiny, 2, callback, **options)
    assert difference(pictures, plain) == 0
    assert callback.records == []
    assert match in callback.failure


def test_a_check_before_the_run(sd):
    scorer = formula_scorer()
    for family, match in [
        ("pixart", "PixArtSigmaPipeline has no callback_on_step_end"),
        ("sd_upscale", "StableDiffusionUpscalePipeline has no callback_on_step_end"),
        ("sdxl_modular", "VisualQualityR1Block"),
    ]:
        with pytest.raises(UnsupportedError, match=match):
            VisualQualityR1Callback(scorer, every=2).check(build(family).pipe)
    with pytest.raises(ValueError, match="no-such-folder"):
        VisualQualityR1Callback(QualityScorer("./no-such-folder", device="cpu"), every=2).check(sd.pipe)
    VisualQualityR1Callback(scorer, every=2).check(sd.pipe)
    VisualQualityR1Callback(scorer, every=2, decode=lambda pipe, latents: []).check(build("ltx").pipe)


def test_the_settings_can_be_saved_and_loaded(sd, tmp_path):
    callback = VisualQualityR1Callback(formula_scorer(), every=2, stop_below=1.5, frames=2)
    callback.save_config(tmp_path)
    again = VisualQualityR1Callback.from_config(VisualQualityR1Callback.load_config(tmp_path), metric=formula_scorer())
    assert (again.every, again.at_step, again.at_ratio, again.stop_below) == (2, None, None, 1.5)
    assert again.config.frames == 2
    call(sd, 1, again)
    assert [record.step for record in again.records] == [1, 3, 5]


def test_missing_latents():
    tiny = build("flux")
    callback = VisualQualityR1Callback(formula_scorer(), at_step=2)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        tiny.pipe(**tiny.arguments, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_pipelines_without_a_known_decoder(sd):
    class Other(type(sd.pipe)):
        pass

    pipe = Other(**sd.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tiny = SimpleNamespace(pipe=pipe, arguments=sd.arguments)
    with pytest.warns(UserWarning, match="use BestOfN"):
        call(tiny, 1, VisualQualityR1Callback(formula_scorer(), at_step=2))

    def decode(pipe: DiffusionPipeline, latents):
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(images.detach(), output_type="pil")

    own = VisualQualityR1Callback(formula_scorer(), at_step=2, decode=decode)
    call(tiny, 2, own)
    known = VisualQualityR1Callback(formula_scorer(), at_step=2)
    call(sd, 2, known)
    assert [r.score for r in own.records] == pytest.approx([r.score for r in known.records], abs=0.02)
