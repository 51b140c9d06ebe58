"""A call of `BestOfN` keeps its state to itself: other threads, other pipes of the same weights, copied schedulers."""

import copy
import functools
import threading

import diffusers
import pytest
import torch
from diffusers_matrix import difference, make_alone
from stub_scorer import formula_scorer
from tiny_pipelines import TinyPipe, build

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError, VisualQualityR1Callback

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RUNS = {
    "plain": {"n": 4},
    "inplace": {"n": 4, "preview_at_ratio": 0.4, "survivors": 2, "strategy": "inplace"},
    "restart": {"n": 4, "preview_at_ratio": 0.4, "survivors": 2, "strategy": "restart"},
}


def sharing(tiny: TinyPipe) -> TinyPipe:
    """Another pipe of the same weights, with a scheduler of its own, as diffusers' maintainers advise for threads."""
    parts = dict(tiny.pipe.components, scheduler=type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config))
    options = {"requires_safety_checker": False} if "requires_safety_checker" in tiny.pipe.config else {}
    pipe = type(tiny.pipe)(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return TinyPipe(pipe, dict(tiny.arguments))


class Meeting:
    """Lets another thread run to its end in the middle of a denoiser call of this one."""

    def __init__(self, module, at_call, work):
        self.module, self.at_call, self.work, self.calls = module, at_call, work, 0
        self.thread = threading.get_ident()

    def __enter__(self):
        self.hook = self.module.register_forward_pre_hook(self.meet)
        return self

    def meet(self, *_):
        if threading.get_ident() != self.thread:
            return
        self.calls += 1
        if self.calls == self.at_call:
            worker = threading.Thread(target=self.work)
            worker.start()
            worker.join()

    def __exit__(self, *_):
        self.hook.remove()


def run(tiny, options):
    arguments = tiny.arguments | {"output_type": "np"}
    return BestOfN(tiny.pipe, formula_scorer())(arguments.pop("prompt"), **options, **arguments)


@pytest.mark.parametrize("family", ["sd", "flux", "z_image"])
@pytest.mark.parametrize("kind", RUNS)
def test_another_thread_with_the_same_weights_gets_its_own_pictures(family, kind):
    ours, theirs = build(family), None
    theirs = sharing(ours)
    theirs.arguments["output_type"] = "np"
    denoiser = getattr(ours.pipe, "unet", None) or ours.pipe.transformer
    expected, alone = make_alone(theirs, 9), run(ours, RUNS[kind])
    found = []
    for at_call in (1, 4, 6):
        with Meeting(denoiser, at_call, lambda: found.append(make_alone(theirs, 9))) as meeting:
            out = run(ours, RUNS[kind])
        assert meeting.calls >= at_call
        assert difference(found[-1], expected) == 0
        assert out.denoiser_rows == alone.denoiser_rows
        assert difference(out.images[0], alone.images[0]) == 0
    assert not vars(denoiser).get("_compiled_call_impl")


@pytest.mark.parametrize("same_pipe", [False, True])
def test_two_runs_at_once(sd, same_pipe):
    """Also on one pipe object, which diffusers itself cannot do."""
    first, second = sd, sd if same_pipe else sharing(sd)
    alone = run(first, RUNS["inplace"]), run(second, RUNS["inplace"] | {"seed": 50})
    both = []
    with Meeting(sd.pipe.unet, 5, lambda: both.append(run(second, RUNS["inplace"] | {"seed": 50}))):
        both.insert(0, run(first, RUNS["inplace"]))
    for out, same in zip(both[::-1] if both[0].seeds[0] >= 50 else both, alone, strict=True):
        assert (out.seeds, out.denoiser_rows) == (same.seeds, same.denoiser_rows)
        assert difference(out.images[0], same.images[0]) == 0


def test_free_running_threads(sd):
    others = [sharing(sd) for _ in range(3)]
    for tiny in others:
        tiny.arguments["output_type"] = "np"
    expected = [make_alone(tiny, 7 + i) for i, tiny in enumerate(others)]
    alone = run(sd, RUNS["inplace"])
    wrong = []

    def work(i):
        for _ in range(4):
            wrong.append(difference(make_alone(others[i], 7 + i), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    outputs = [run(sd, RUNS["inplace"]) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert max(wrong) == 0
    assert {out.denoiser_rows for out in outputs} == {alone.denoiser_rows}
    assert max(difference(out.images[0], alone.images[0]) for out in outputs) == 0


def test_the_callback_of_one_pipe_and_a_plain_call_of_another(sd):
    other = sharing(sd)
    other.arguments["output_type"] = "np"
    expected, found = make_alone(other, 9), []
    callback = VisualQualityR1Callback(formula_scorer(), every=1)
    arguments = sd.arguments | {"output_type": "np"}
    plain = sd.pipe(**arguments, generator=torch.Generator().manual_seed(1)).images
    with Meeting(sd.pipe.unet, 3, lambda: found.append(make_alone(other, 9))):
        generator = torch.Generator().manual_seed(1)
        watched = sd.pipe(**arguments, generator=generator, callback_on_step_end=callback).images
    assert difference(found[0], expected) == 0
    assert difference(watched, plain) == 0
    assert len(callback.records) == 5


def test_draws_of_other_threads_are_not_taken_for_the_schedulers(sd):
    with Meeting(sd.pipe.unet, 2, lambda: torch.randn(8)):
        assert run(sd, {"n": 1}).interrupted is None
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.randn(8)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert len(run(sd, RUNS["inplace"]).records) == 4
    finally:
        stop.set()
        thread.join()


class GlobalNoise(diffusers.DDIMScheduler):
    """Draws from the global generator, whatever it is given."""

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True):
        torch.randn_like(sample)
        return super().step(model_output, timestep, sample, return_dict=return_dict)


def test_draws_of_the_scheduler_from_the_global_generator_are_an_error(sd):
    sd.pipe.scheduler = GlobalNoise.from_config(sd.pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match="GlobalNoise draws noise from PyTorch's global generator"):
        run(sd, {"n": 1})


class Copying(diffusers.StableDiffusionPipeline):
    """Steps a second kind of latents with a copy of its scheduler (as LTX-2 for sound), or everything."""

    only_copies = False

    def prepare_extra_step_kwargs(self, generator, eta):
        original = self.scheduler
        second = copy.deepcopy(original)
        self.second_steps = 0
        taken = super().prepare_extra_step_kwargs(generator, eta)
        outer = self

        class Both:
            def __getattr__(self, name):
                return getattr(original, name)

            def step(self, model_output, timestep, sample, **options):
                outer.second_steps += 1
                other = second.step(model_output * 0.5, timestep, sample, **options)
                return other if outer.only_copies else original.step(model_output, timestep, sample, **options)

        vars(self)["scheduler"] = Both()
        return taken

    @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
    def __call__(self, *args, **kwargs):
        mine = self.scheduler
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self)["scheduler"] = mine


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_pipelines_that_copy_their_scheduler(scheduler):
    tiny = build("sd", scheduler)
    tiny.pipe = Copying(**tiny.pipe.components, requires_safety_checker=False)
    tiny.pipe.set_progress_bar_config(disable=True)
    tiny.arguments["output_type"] = "np"
    expected = make_alone(tiny, 0)
    out = run(tiny, {"n": 2, "keep": 2})
    assert difference(out.records[0].picture, expected) <= 1e-5
    pruned = run(tiny, {"n": 2, "preview_at_ratio": 0.4, "survivors": 1})
    survivor = next(record for record in pruned.records if record.survived)
    assert difference(survivor.picture, make_alone(tiny, survivor.seed)) <= 1e-5
    tiny.pipe.only_copies = True
    assert len(run(tiny, {"n": 2}).records) == 2
    with pytest.raises(UnsupportedError, match="steps copies of its scheduler"):
        run(tiny, {"n": 2, "preview_at_ratio": 0.4})


def test_a_denoiser_that_is_no_module(sd):
    """An engine of another runtime, say: any callable with a configuration."""
    plain = run(sd, RUNS["inplace"])

    class Engine:
        def __init__(self, unet):
            self.config, self.dtype, self.unet = unet.config, unet.dtype, unet

        def __call__(self, *args, **kwargs):
            return self.unet(*args, **kwargs)

    vars(sd.pipe)["unet"] = Engine(sd.pipe.unet)
    out = run(sd, RUNS["inplace"])
    assert (out.denoiser_rows, out.seeds) == (plain.denoiser_rows, plain.seeds)
    assert difference(out.images[0], plain.images[0]) == 0


def test_classes_of_the_same_name_are_not_the_tested_ones(sd):
    pipe_kind = type("StableDiffusionPipeline", (diffusers.StableDiffusionPipeline,), {})
    pipe = pipe_kind(**sd.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfN(pipe, formula_scorer())
    assert best.batch_size == 1
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline was not tested"):
        best(n=2, preview_at_ratio=0.4, strategy="inplace", **sd.arguments)
    with pytest.raises(UnsupportedError, match="no preview inside a run"):
        VisualQualityR1Callback(formula_scorer(), every=2).check(pipe)

    scheduler_kind = type("DDIMScheduler", (diffusers.DDIMScheduler,), {})
    sd.pipe.scheduler = scheduler_kind.from_config(sd.pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match="DDIMScheduler was not tested"):
        BestOfN(sd.pipe, formula_scorer())(n=2, preview_at_ratio=0.4, strategy="inplace", **sd.arguments)
    # Its step tells the clean prediction itself, so previews are right, and survivors restart.
    assert run(sd, {"n": 2, "preview_at_ratio": 0.4, "survivors": 1}).strategy == "restart"


class Slower(diffusers.FlowMatchEulerDiscreteScheduler):
    """Somebody's own flow scheduler, of which nothing is known."""


def test_an_unknown_flow_scheduler_has_no_previews():
    tiny = build("flux")
    tiny.pipe.scheduler = Slower.from_config(tiny.pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match="but got Slower"):
        run(tiny, {"n": 2, "preview_at_ratio": 0.4})
    assert len(run(tiny, {"n": 2}).records) == 2
