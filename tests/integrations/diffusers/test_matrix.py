"""Every family and every scheduler: survivors are the pictures that they should be, and cost what was promised."""

import re

import pytest
import torch
from diffusers_matrix import FLOW_SCHEDULERS, NAMES, NOISE_SCHEDULERS, TABLE, check, line
from tiny_pipelines import FAMILIES, build

from vqr1_metric.integrations.diffusers.tested import TESTED

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
    ("sdxl_controlnet", "EulerDiscreteScheduler"),
    ("lcm", "LCMScheduler"),
    ("controlnet_img2img", "DDIMScheduler"),
    ("pix2pix", "EulerDiscreteScheduler"),
    ("sd_upscale", "DDIMScheduler"),
    ("sdxl_controlnet_img2img", "DPMSolverMultistepScheduler"),
    ("flux_fill", "FlowMatchEulerDiscreteScheduler"),
    ("flux_kontext", "FlowMatchEulerDiscreteScheduler"),
    ("qwen_edit", "FlowMatchEulerDiscreteScheduler"),
    ("flux_img2img", "FlowMatchEulerDiscreteScheduler"),
    ("pixart_alpha", "DPMSolverMultistepScheduler"),
    ("sdxl_modular", "EulerAncestralDiscreteScheduler"),
    ("sd3", "FlowMatchHeunDiscreteScheduler"),
    ("flux", "FlowMatchLCMScheduler"),
    ("flux2", "FlowMatchEulerDiscreteScheduler"),
    ("flux2_klein", "FlowMatchEulerDiscreteScheduler"),
    ("pixart", "DPMSolverSinglestepScheduler"),
    ("sana", "DPMSolverMultistepScheduler"),
    ("qwen_image", "FlowMatchEulerDiscreteScheduler"),
    ("z_image", "FlowMatchEulerDiscreteScheduler"),
    ("ltx", "FlowMatchEulerDiscreteScheduler"),
    ("wan", "FlowMatchEulerDiscreteScheduler"),
    ("wan22", "UniPCMultistepScheduler"),
]


def test_pairs_hold_every_family_and_every_scheduler():
    assert {family for family, _ in PAIRS} == set(FAMILIES) == set(NAMES)
    assert {scheduler for _, scheduler in PAIRS} == {*NOISE_SCHEDULERS, *FLOW_SCHEDULERS}


def test_the_table_of_names_is_that_of_the_matrix():
    assert {type(build(family).pipe).__name__ for family in FAMILIES} == set(TESTED)


@pytest.mark.parametrize(("family", "scheduler"), PAIRS)
def test_survivors_are_the_pictures_of_an_unpruned_run_and_of_their_seeds(family, scheduler):
    checked = check(family, scheduler)
    assert checked.exact, checked
    assert checked.candidates > 0.02, "candidates so alike that a mix-up would not show"
    plain, restart, inplace = checked.rows
    assert inplace < plain
    assert inplace < restart


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_the_line_of_the_table(family):
    """Exact with the schedulers that the document names, but for the last digits of the differences."""
    made = line(family)
    assert "(!)" not in made
    written = next(
        row for row in TABLE.read_text(encoding="utf-8").splitlines() if row.startswith(f"| {NAMES[family]} |")
    )
    assert _without_differences(made) == _without_differences(written), "tests/diffusers_matrix.py --write"


def _without_differences(row):
    return re.sub(r" \de[+-]\d\d", "", row)
