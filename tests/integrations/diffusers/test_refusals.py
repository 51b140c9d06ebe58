"""What `BestOfN` refuses, before any denoising where that can be known, and where it restarts rather than be wrong."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import apply_first_block_cache
from diffusers_matrix import difference, make_alone
from stub_scorer import formula_scorer
from tiny_pipelines import build

from vqr1_metric.integrations.diffusers import BestOfN, UnsupportedError
from vqr1_metric.scorer import QualityScorer

torch.set_num_threads(1)
# diffusers and its schedulers warn about their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


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
        (ValueError, "generators on the CPU", {"n": 1, "generator": [SimpleNamespace(device=torch.device("cuda", 0))]}),
        (ValueError, "latents", {"latents": torch.zeros(8, 4, 16, 16)}),
        (ValueError, "output_type", {"output_type": "latent"}),
        (TypeError, "takes no colour", {"colour": "red"}),
        (TypeError, "Expected n instead", {"num_images_per_prompt": 4}),
    ]:
        with pytest.raises(error, match=match):
            best(**(prompt | arguments))
    with pytest.raises(ValueError, match="at least one prompt"):
        best([])
    with pytest.raises(ValueError, match="one negative_prompt for each of 2 prompts, but got 3"):
        best(**prompt | {"prompt": ["a cat", "a dog"], "negative_prompt": ["blur"] * 3})
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
        self.scheduler, self.prior = (
            scheduler,
            torch.nn.Identity(),
        )  # as the first of two pipelines: it gives embeddings

    def __call__(self, generator=None):
        return None


def test_a_pipe_that_gives_no_pictures(sd):
    class Embeddings(type(sd.pipe)):
        def __call__(self, generator=None, num_images_per_prompt=1):
            return SimpleNamespace(image_embeds=torch.zeros(num_images_per_prompt, 4))

    pipe = Embeddings(**sd.pipe.components, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match="Expected pictures or videos, but Embeddings"):
        BestOfN(pipe, formula_scorer())(n=2)


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


@pytest.mark.parametrize("applied", [False, True])
def test_cached_activations_restart_one_by_one(applied):
    """They are those of earlier steps, and one decision to use them is made for the whole batch."""
    flux = build("flux")
    flux.arguments |= {"output_type": "np", "num_inference_steps": 12}
    arguments = flux.arguments
    best = BestOfN(flux.pipe, formula_scorer())
    assert best.batch_size == 4
    config = FirstBlockCacheConfig(threshold=0.2)
    if applied:
        apply_first_block_cache(flux.pipe.transformer, config)
    else:
        flux.pipe.transformer.enable_cache(config)
    plain = best(n=4, keep=4, **arguments)
    pruned = best(n=4, preview_at_ratio=0.5, survivors=2, **arguments)
    assert (pruned.strategy, best.batch_size) == ("restart", 1)
    for record, same in zip(pruned.records, plain.records, strict=True):
        assert not record.survived or difference(record.picture, same.picture) <= 1e-5
        assert difference(make_alone(flux, same.seed), same.picture) <= 1e-5
    with pytest.raises(UnsupportedError, match="caches activations"):
        best(n=2, preview_at_ratio=0.5, strategy="inplace", **arguments)


def test_guiders_that_may_keep_a_moving_average_restart():
    tiny = build("sdxl_modular")
    arguments = tiny.arguments | {"output_type": "np"}
    tiny.pipe.update_components(
        guider=AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5)
    )
    best = BestOfN(tiny.pipe, formula_scorer())
    plain, pruned = best(n=3, keep=3, **arguments), best(n=3, preview_at_ratio=0.5, survivors=1, **arguments)
    assert pruned.strategy == "restart"
    for record, same in zip(pruned.records, plain.records, strict=True):
        assert not record.survived or difference(record.picture, same.picture) <= 1e-5


def test_scheduler_without_clean_prediction():
    tiny = build("sd", "IPNDMScheduler")
    best = BestOfN(tiny.pipe, formula_scorer())
    with pytest.raises(UnsupportedError, match="IPNDMScheduler"):
        best(n=2, preview_at_ratio=0.5, **tiny.arguments)
    assert len(best(n=2, keep=2, **tiny.arguments).images) == 2
