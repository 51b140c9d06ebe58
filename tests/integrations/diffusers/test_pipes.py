"""`BestOfN` with compiled, offloaded, sliced and half-precision pipes; the pipe is left as it was."""

import pytest
import torch
from diffusers_matrix import difference, make_alone
from stub_scorer import formula_scorer
from tiny_pipelines import failing, offload

from vqr1_metric.integrations.diffusers import BestOfN
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
# diffusers and its schedulers warn about their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def state_of(pipe):
    """What a run could leave behind: patched methods, hooks, scheduler settings, flags."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    hooks = {
        n: (len(m._forward_pre_hooks), len(m._forward_hooks), "_compiled_call_impl" in vars(m))
        for n, m in modules.items()
    }
    scheduler = {k: v.tolist() if isinstance(v, torch.Tensor) else repr(v) for k, v in vars(pipe.scheduler).items()}
    return hooks, scheduler, getattr(pipe, "_interrupt", False)


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
    with failing(sd.pipe.unet, failing_call), pytest.raises(RuntimeError, match="out of memory"):
        BestOfN(sd.pipe, formula_scorer())(n=4, preview_at_ratio=0.5, **sd.arguments)
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


@pytest.mark.parametrize("kind", ["model offload", "group offload", "slicing"])
def test_offloading_and_slicing(sd, kind):
    arguments = dict(sd.arguments, n=4, preview_at_ratio=0.5, survivors=2)
    plain = BestOfN(sd.pipe, formula_scorer())(**arguments)
    if kind == "slicing":
        sd.pipe.vae.enable_slicing()
        sd.pipe.enable_attention_slicing()
    else:
        offload(sd.pipe, kind)
    before = kept_hooks(sd.pipe)
    assert kind == "slicing" or before
    out = BestOfN(sd.pipe, formula_scorer())(**arguments)
    assert kept_hooks(sd.pipe) == before
    assert (out.strategy, out.denoiser_rows, out.seeds) == ("inplace", plain.denoiser_rows, plain.seeds)
    assert difference(out.images[0], plain.images[0]) <= 1


def kept_hooks(pipe):
    """Kinds of hooks of accelerate and diffusers on the UNet and its parts."""
    modules = list(pipe.unet.named_modules())
    hooks = [(name, type(m._hf_hook).__name__) for name, m in modules if hasattr(m, "_hf_hook")]
    return hooks + [(name, sorted(m._diffusers_hook.hooks)) for name, m in modules if hasattr(m, "_diffusers_hook")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(sd, dtype):
    sd.pipe.to(dtype)
    arguments = dict(sd.arguments, n=4, survivors=2, output_type="np")
    plain = BestOfN(sd.pipe, formula_scorer())(**arguments)
    pruned = BestOfN(sd.pipe, formula_scorer())(preview_at_ratio=0.5, strategy="inplace", **arguments)
    for a, b in zip(pruned.records, plain.records, strict=True):
        assert not a.survived or difference(a.picture, b.picture) < 0.02  # batch size changes half-precision kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("pipe_device", "scorer_device"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_pipe_and_scorer_on_any_devices(sd, tiny_qwen2_5_vl, pipe_device, scorer_device):
    sd.pipe.to(pipe_device)
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device=scorer_device)
    for output_type in ("pil", "pt"):
        out = BestOfN(sd.pipe, scorer)(n=4, preview_at_ratio=0.5, output_type=output_type, **sd.arguments)
        assert out.strategy == "inplace"
        assert 1 <= out.scores[0] <= 5
