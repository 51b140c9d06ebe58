"""The clean predictions of each scheduler against its own."""

import contextlib
import inspect

import diffusers
import pytest
import torch

from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, check_previews, clean_prediction

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_clean_predictions_are_those_of_the_schedulers(name, prediction_type):
    if (name, prediction_type) == ("EulerAncestralDiscreteScheduler", "sample"):
        pytest.skip("the scheduler has no such prediction")
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        output = torch.randn(2, 4, 8, 8, generator=generator)
        clean = clean_prediction(scheduler, output, timestep, sample)
        result = scheduler.step(output, timestep, sample)
        assert torch.allclose(clean, result.pred_original_sample, atol=1e-4, rtol=1e-4)
        sample = result.prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_clean_predictions_of_the_solvers(name, prediction_type):
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    for place, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 8, 8, generator=generator)
        clean, sigma = clean_prediction(scheduler, output, timestep, sample), scheduler.sigmas[place]
        following = scheduler.step(output, timestep, sample).prev_sample
        theirs = scheduler.model_outputs[-1]
        if name != "DEISMultistepScheduler":  # which converts to noise
            assert torch.allclose(clean, theirs, atol=1e-4, rtol=1e-4)
        else:
            alpha = 1 / (sigma**2 + 1) ** 0.5
            assert torch.allclose(alpha * clean + alpha * sigma * theirs, sample, atol=1e-4)
        sample = following


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_clean_predictions_are_thresholded_as_the_scheduler_does(name):
    scheduler = getattr(diffusers, name)(thresholding=True, sample_max_value=1.5)
    scheduler.set_timesteps(6)
    sample, output = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[0]
    clean = clean_prediction(scheduler, output, timestep, sample)
    stepped = scheduler.step(output, timestep, sample)
    theirs = scheduler.model_outputs[-1] if hasattr(scheduler, "model_outputs") else stepped.pred_original_sample
    assert torch.allclose(clean, theirs, atol=1e-4)


@pytest.mark.parametrize("inverted", [False, True])
def test_clean_prediction_of_a_straight_flow_is_where_it_ends(inverted):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = clean - noise if inverted else noise - clean
    sample = noise
    for timestep in scheduler.timesteps:
        found = clean_prediction(scheduler, velocity, timestep, sample)
        sample = scheduler.step(velocity, timestep, sample).prev_sample
        assert torch.allclose(found, clean, atol=1e-5)
    assert torch.allclose(sample, clean, atol=1e-5)


def test_clean_prediction_of_an_exact_denoiser_is_the_clean_picture():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    for timestep in scheduler.timesteps:
        sample = scheduler.add_noise(clean, noise, timestep[None])
        assert torch.allclose(clean_prediction(scheduler, noise, timestep, sample), clean, atol=1e-3)


PREVIEWED = [
    "CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("name", PREVIEWED)
def test_an_exact_denoiser_gives_the_clean_picture_in_the_middle_of_any_schedule(name, start):
    kind = getattr(diffusers, name)
    options = {"clip_sample": False} if "clip_sample" in inspect.signature(kind).parameters else {}
    scheduler = kind(**options)
    check_previews(scheduler)
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[start]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    flow = name.startswith("FlowMatch")
    noisy = scheduler.scale_noise(clean, timestep[None], noise) if flow else None
    noisy = scheduler.add_noise(clean, noise, timestep[None]) if noisy is None else noisy
    scheduler.is_scale_input_called = True
    found = clean_prediction(scheduler, noise - clean if flow else noise, timestep, noisy)
    assert torch.allclose(found, clean, atol=1e-4)


def test_every_other_scheduler_is_refused_before_the_first_step_or_tells_its_own_prediction():
    known = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            with contextlib.suppress(ImportError, TypeError, UnsupportedError):  # other libraries, no defaults, refused
                check_previews(getattr(diffusers, name)())
                known.add(name)
    assert known - set(PREVIEWED) <= {"DDIMInverseScheduler", "EDMEulerScheduler", "UnCLIPScheduler"}
    assert known >= set(PREVIEWED)
