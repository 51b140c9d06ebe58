"""`VisualQualityR1Block` in a modular SDXL pipeline."""

import pytest
import torch
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers_matrix import difference
from stub_scorer import formula_scorer
from tiny_pipelines import build

from vqr1_metric.integrations.diffusers import UnsupportedError, VisualQualityR1Block, VisualQualityR1Callback

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def modular(block=None):
    """A modular pipe of the parts of the tiny SDXL pipe, with or without the block."""
    tiny = build("sdxl")
    blocks = StableDiffusionXLAutoBlocks()
    if block is not None:
        block.insert_into(blocks)
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: part for name, part in tiny.pipe.components.items() if part is not None})
    return pipe, tiny


def test_previews_are_those_of_the_callback_in_the_usual_pipeline():
    scorer = formula_scorer()
    block = VisualQualityR1Block(scorer, every=2)
    pipe, tiny = modular(block)
    arguments = dict(tiny.arguments, output_type="np", num_images_per_prompt=2)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    pictures = pipe(**arguments, generator=generators(), output="images")
    assert difference(pictures, modular()[0](**arguments, generator=generators(), output="images")) == 0
    assert [(r.step, r.candidate) for r in block.records] == [(s, c) for s in (1, 3, 5) for c in range(2)]
    assert [r.score for r in block.records] == [r.score for r in scorer.score([r.preview for r in block.records])]
    for record, picture in zip(block.records[-2:], pictures, strict=True):
        assert difference(record.preview, (picture * 255).round()) <= 1

    callback = VisualQualityR1Callback(scorer, every=2)
    tiny.pipe(**arguments | {"guidance_scale": 7.5}, generator=generators(), callback_on_step_end=callback)
    for ours, theirs in zip(block.records, callback.records, strict=True):
        assert difference(ours.preview, theirs.preview) <= 1


@pytest.mark.parametrize(
    ("options", "scheduler", "match"),
    [
        ({"at_step": 6}, None, "within the 6 steps of this run, but got at_step=6"),
        ({"every": 7}, None, "within the 6 steps of this run, but got every=7"),
        ({"every": 6}, "IPNDMScheduler", "but got IPNDMScheduler"),
        ({"every": 6, "decode": lambda *_: 1 / 0}, None, "division by zero"),
    ],
)
def test_what_cannot_work_is_a_warning_and_the_run_goes_on(options, scheduler, match):
    block = VisualQualityR1Block(formula_scorer(), **options)
    pipe, tiny = modular(block)
    if scheduler is not None:
        pipe.update_components(scheduler=build("sdxl", scheduler).pipe.scheduler)
    with pytest.warns(UserWarning, match=match):
        assert len(pipe(**tiny.arguments, output="images")) == 1
    assert block.records == []


def presets():
    """Every preset of blocks that diffusers has."""
    import diffusers.modular_pipelines as modules

    return sorted(name for name in dir(modules) if name.endswith("Blocks") and "Auto" in name and len(name) > 18)


@pytest.mark.parametrize("name", presets())
def test_one_object_of_a_preset_gets_the_block_and_no_other(name):
    import diffusers.modular_pipelines as modules

    kind = getattr(modules, name)
    before, blocks, block = repr(kind()), kind(), VisualQualityR1Block(formula_scorer(), every=1)
    try:
        count = block.insert_into(blocks)
    except UnsupportedError:
        assert "after_denoiser" not in names(blocks)
        pytest.skip("its loop has no such block")
    assert names(blocks).count("visual_quality_r1") == count
    assert names(kind()).count("visual_quality_r1") == 0
    assert repr(kind()) == before
    pipe_blocks = blocks.init_pipeline().blocks
    assert names(pipe_blocks).count("visual_quality_r1") == count
    assert block.remove_from(blocks) == count
    assert repr(blocks) == before


def names(blocks):
    """Of all blocks within, at every depth."""
    children = getattr(blocks, "sub_blocks", None) or {}
    return [*children, *(name for child in children.values() for name in names(child))]


def test_bad_arguments():
    for options in ({}, {"every": 1, "at_step": 1}, {"every": 0}, {"at_step": -1}):
        with pytest.raises(ValueError, match="Expected"):
            VisualQualityR1Block(formula_scorer(), **options)
    with pytest.raises(UnsupportedError, match="no denoising loop"):
        VisualQualityR1Block(formula_scorer(), every=1).insert_into(object())
