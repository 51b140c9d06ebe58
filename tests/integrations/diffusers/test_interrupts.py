"""Runs that end before their time: cancelled, stopped, failing; what was finished is handed back, and only that."""

import inspect
import math
import threading

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers_matrix import difference, make_alone
from stub_scorer import formula_scorer
from tiny_pipelines import build, failing

from vqr1_metric.integrations.diffusers import BestOfN, VisualQualityR1Callback
from vqr1_metric.integrations.diffusers.calls import Call

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def best_of(tiny, **options):
    arguments = tiny.arguments | {"output_type": "np"} | options
    return BestOfN(tiny.pipe, options.pop("scorer", None) or formula_scorer(), batch_size=4)(
        arguments.pop("prompt"), **{name: value for name, value in arguments.items() if name != "scorer"}
    )


def denoiser(tiny):
    return getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer


FAMILIES = ["sd", "sdxl", "sd3", "flux", "img2img", "qwen_image", "wan", "lcm"]


@pytest.mark.parametrize("way", ["argument", "pipe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cancel_hands_back_the_finished_and_nothing_half_done(family, way):
    tiny = build(family)
    calls = []

    def cancel(pipe, step, timestep, values):
        calls.append(step)
        if len(calls) > 6 and step == 1:  # in the second call of the pipe
            (pipe if way == "argument" else tiny.pipe)._interrupt = True
        return values

    whole = best_of(tiny, n=4, keep=4)
    out = best_of(tiny, n=12, keep=12, callback_on_step_end=cancel)
    assert out.interrupted == "cancelled"
    assert out.error is None
    assert sorted(out.seeds) == [0, 1, 2, 3]
    assert difference(out.images[0], whole.images[0]) == 0
    assert [record.survived for record in out.records] == [True] * 4 + [False] * 8
    assert all(record.result is None and record.picture is None for record in out.records[4:])
    assert calls[-1] == 1  # nothing after the cancel


@pytest.mark.parametrize("preview", [None, 0.4])
def test_a_cancel_at_once_gives_nothing(sd, preview):
    def cancel(pipe, step, timestep, values):
        pipe._interrupt = True
        return values

    scorer = formula_scorer()
    out = best_of(sd, n=8, preview_at_ratio=preview, callback_on_step_end=cancel, scorer=scorer)
    assert (out.images, out.ranking, out.interrupted) == ([], [], "cancelled")
    assert scorer.backend.pictures == 0
    assert math.isnan(out.win_probability)
    with pytest.raises(ValueError, match="no candidate was finished"):
        out.grid()
    assert best_of(sd, n=2).interrupted is None  # the next run is not cancelled


def test_a_cancel_from_another_thread_and_without_a_callback(sd):
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == 8:  # in the second call of the pipe
            thread = threading.Thread(target=lambda: setattr(sd.pipe, "_interrupt", True))
            thread.start()
            thread.join()

    hook = sd.pipe.unet.register_forward_pre_hook(cancel)
    out = best_of(sd, n=12)
    hook.remove()
    assert (out.interrupted, len(out.ranking)) == ("cancelled", 4)
    assert len(calls) == 8


def test_a_cancel_at_the_last_step_keeps_that_call(sd):
    def cancel(pipe, step, timestep, values):
        pipe._interrupt = step == 5
        return values

    out = best_of(sd, n=12, keep=4, callback_on_step_end=cancel)
    assert (out.interrupted, sorted(out.seeds)) == ("cancelled", [0, 1, 2, 3])
    assert difference(out.images[0], make_np(sd, out.seeds[0])) <= 1e-5


def make_np(tiny, seed):
    tiny.arguments["output_type"] = "np"
    return make_alone(tiny, seed)


def test_a_cancel_ends_a_list_of_prompts(sd):
    seen = []

    def cancel(pipe, step, timestep, values):
        seen.append(step)
        pipe._interrupt = len(seen) == 8
        return values

    outputs = best_of(sd, n=4, prompt=["a", "b", "c"], callback_on_step_end=cancel)
    assert [len(out.images) for out in outputs] == [1, 0, 0]
    assert outputs[0].interrupted is None
    assert outputs[1].interrupted == "cancelled"
    assert "not begun" in outputs[2].interrupted


@pytest.mark.parametrize("multiple", [False, True])
def test_stop_below_gives_up_its_candidates_and_no_half_done_picture_is_chosen(sd, multiple):
    class Other(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012 (as in diffusers' own)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return callback_kwargs

    stop = VisualQualityR1Callback(formula_scorer(), at_step=2, stop_below=4.99)
    callback = MultiPipelineCallbacks([Other(), stop]) if multiple else stop
    out = best_of(sd, n=8, callback_on_step_end=callback)
    assert out.images == []
    assert "stop_below" in out.interrupted
    assert out.denoiser_rows == 2 * 8 * 3

    scores = [record.score for record in best_of(sd, n=8).records]
    pick = VisualQualityR1Callback(formula_scorer(), at_step=4, stop_below=3.0)
    out = best_of(sd, n=8, keep=4, callback_on_step_end=pick)
    for record, score in zip(out.records, scores, strict=True):
        assert record.picture is None or record.score == pytest.approx(score, abs=0.01)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("family", ["sd", "flux", "pixart", "sdxl_modular"])
def test_a_failure_gives_back_what_was_finished(family, error):
    tiny = build(family)
    per_call = best_of_calls(tiny)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3 * per_call + 2:  # candidates 13 to 16
            raise error

    hook = denoiser(tiny).register_forward_pre_hook(fail)
    seen = []
    out = best_of(tiny, n=16, keep=3, on_candidate=seen.append)
    hook.remove()
    assert out.error is error
    assert out.interrupted.startswith(type(error).__name__)
    assert [record.survived for record in out.records] == [True] * 12 + [False] * 4
    assert [record.seed for record in seen] == list(range(12))
    assert len(out.images) == 3
    assert out.scores[0] == max(record.score for record in out.records[:12])


def best_of_calls(tiny):
    """Denoiser calls of one call of the pipe."""
    calls = []
    hook = denoiser(tiny).register_forward_pre_hook(lambda *_: calls.append(1))
    best_of(tiny, n=1)
    hook.remove()
    return len(calls)


def test_what_fails_while_candidates_are_handed_on_or_scored_loses_none(sd):
    def full(candidate):
        if candidate.seed == 5:
            raise OSError("no space left on device")

    out = best_of(sd, n=12, keep=12, on_candidate=full)
    assert isinstance(out.error, OSError)
    assert sorted(out.seeds) == list(range(8))

    class Impatient(Failing):
        def score(self, images):
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt
            return self.inner.score(images)

    out = best_of(sd, n=12, keep=12, scorer=Impatient(()))
    assert (out.interrupted, sorted(out.seeds)) == ("KeyboardInterrupt", [0, 1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        best_of(sd, n=4, preview_at_ratio=0.4, survivors=2, scorer=Impatient(()))


def test_a_failure_before_anything_was_finished_is_raised(sd):
    with failing(sd.pipe.unet, 3), pytest.raises(RuntimeError, match="out of memory"):
        best_of(sd, n=16)
    with failing(sd.pipe.unet, 3), pytest.raises(RuntimeError, match="out of memory"):
        best_of(sd, n=4, preview_at_ratio=0.4)


@pytest.mark.parametrize("strategy", ["inplace", "restart"])
def test_a_failure_among_previews_goes_on_with_those_that_are_known(sd, strategy):
    with failing(sd.pipe.unet, 8):  # the last of nine calls for previews of 12 candidates
        out = best_of(sd, n=12, keep=2, preview_at_ratio=0.4, survivors=2, strategy=strategy)
    assert "out of memory" in out.interrupted
    assert len(out.images) == 2
    assert not any(record.survived for record in out.records[8:])
    best = sorted(out.records[:8], key=lambda record: -record.preview_score)[:2]
    assert all(record.survived for record in best)
    assert difference(out.images[0], make_np(sd, out.seeds[0])) <= 1e-5


def test_a_failing_prompt_of_a_list_costs_only_itself_and_what_follows(sd):
    with failing(sd.pipe.unet, 8):
        outputs = best_of(sd, n=4, prompt=["a", "b", "c"])
    assert [len(out.images) for out in outputs] == [1, 0, 0]
    assert "out of memory" in outputs[1].interrupted


class Failing:
    """A scorer that fails at chosen calls."""

    def __init__(self, calls):
        self.calls, self.count, self.inner = calls, 0, formula_scorer()

    @property
    def backend(self):
        return self.inner.backend

    def score(self, images):
        self.count += 1
        if self.count in self.calls:
            raise RuntimeError("CUDA out of memory")
        return self.inner.score(images)


def test_a_failing_scorer_costs_scores_and_no_pictures(sd):
    with pytest.warns(UserWarning, match="CUDA out of memory"):
        out = best_of(sd, n=8, keep=8, scorer=Failing({1}))
    assert out.interrupted is None
    assert [math.isnan(score) for score in out.scores] == [False] * 4 + [True] * 4
    assert "CUDA out of memory" in out.ranking[-1].result.error
    assert all(image is not None for image in out.images)


@pytest.mark.parametrize(("calls", "survivors"), [({1}, {4, 5, 6, 7}), ({1, 2}, set(range(8)))])
def test_a_failing_scorer_of_previews_leaves_the_choice_to_what_is_known(sd, calls, survivors):
    out = best_of(sd, n=8, preview_at_ratio=0.4, survivors=4, scorer=Failing(calls))
    assert {record.seed for record in out.records if record.survived} == survivors
    assert out.scores[0] == max(record.score for record in out.records if record.survived)


def test_a_users_callback_sees_real_steps_only(sd):
    steps = []

    def watch(pipe, step, timestep, values):
        steps.append((step, float(values["latents"].abs().mean())))
        return values

    plain = best_of(sd, n=4, callback_on_step_end=watch)
    whole, steps[:] = list(steps), []
    best_of(sd, n=4, preview_at_ratio=0.4, survivors=2, callback_on_step_end=watch)
    assert plain.strategy == "plain"
    assert [step for step, _ in steps] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert [mean for _, mean in steps[:3]] == [mean for _, mean in whole[:3]]  # the latents, not the prediction


def test_callbacks_of_diffusers_work_within(sd):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    sd.arguments["output_type"] = "np"
    alone = sd.pipe(**sd.arguments, generator=torch.Generator().manual_seed(3), callback_on_step_end=cutoff).images[0]
    out = BestOfN(sd.pipe, formula_scorer(), batch_size=1)(n=1, seed=3, callback_on_step_end=cutoff, **sd.arguments)
    assert difference(out.images[0], alone) <= 1e-5


@pytest.mark.parametrize(("steps", "ratio"), [(6, 0.5), (6, 0.2), (7, 0.5), (9, 0.33), (10, 0.29), (5, 0.4)])
def test_a_ratio_means_the_same_step_everywhere(sd, steps, ratio):
    """In BestOfN, in the callback, and in diffusers' own callbacks."""
    seen = []

    class Own(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == int(
                pipeline.num_timesteps * self.config.cutoff_step_ratio
            ):  # as SDCFGCutoffCallback has it
                seen.append(step_index)
            return callback_kwargs

    assert "int(pipeline.num_timesteps * cutoff_step_ratio)" in inspect.getsource(SDCFGCutoffCallback)
    arguments = sd.arguments | {"num_inference_steps": steps}
    sd.pipe(**arguments, callback_on_step_end=Own(cutoff_step_ratio=ratio))
    callback = VisualQualityR1Callback(formula_scorer(), at_ratio=ratio)
    sd.pipe(**arguments, callback_on_step_end=callback, generator=torch.Generator().manual_seed(0))
    rows = []
    hook = sd.pipe.unet.register_forward_pre_hook(lambda *_: rows.append(1))
    out = BestOfN(sd.pipe, formula_scorer())(n=2, preview_at_ratio=ratio, survivors=1, strategy="inplace", **arguments)
    hook.remove()
    assert [record.step for record in callback.records] == seen
    previewed = len(rows) - (steps - seen[0] - 1)  # calls before the survivor went on
    assert previewed == seen[0] + 1
    assert difference(np.asarray(callback.records[0].preview), np.asarray(out.records[0].preview)) <= 1


def test_steps_are_counted_where_a_pipe_does_not_tell(sd):
    """Kandinsky's image-to-image, for one, has num_timesteps and never sets it."""

    class Silent(type(sd.pipe)):
        @property
        def num_timesteps(self):
            raise AttributeError("_num_timesteps")

    pipe = Silent(**sd.pipe.components, requires_safety_checker=False)
    call = Call(pipe, [torch.Generator().manual_seed(0)])
    pipe.set_progress_bar_config(disable=True)
    call.view(**sd.arguments, generator=call.generators)
    assert (call.total, call.steps, call.complete) == (6, 6, True)
    out = BestOfN(pipe, formula_scorer())(n=2, preview_at_ratio=0.5, survivors=1, **sd.arguments)
    assert out.denoiser_rows == 2 * (2 * 4 + 6)
