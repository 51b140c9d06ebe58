"""Pictures, masks, texts and embeddings reach the candidates of their prompt, in lists and tensors, or are refused."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers_matrix import difference
from PIL import Image
from stub_scorer import formula_scorer
from tiny_pipelines import build
from tiny_pipelines.parts import embedding, picture

from vqr1_metric.integrations.diffusers import BestOfN

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def pictures(count):
    """Pictures that differ much."""
    generator = torch.Generator().manual_seed(3)
    return [
        Image.fromarray((torch.rand(32, 32, 3, generator=generator) * 200 + 50).byte().numpy()) for _ in range(count)
    ]


def masks(count):
    made = np.zeros((count, 32, 32), dtype=np.uint8)
    for i in range(count):
        made[i, : 8 * (i + 1)] = 255
    return [Image.fromarray(mask) for mask in made]


def tensor(listed, kind):
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in listed]
    arrays = [array if array.ndim == 3 else array[..., None] for array in arrays]
    stacked = np.stack(arrays)
    return stacked if kind == "array" else torch.from_numpy(stacked).permute(0, 3, 1, 2)


FROM_A_PICTURE = ["img2img", "sdxl_img2img", "flux_img2img", "inpaint", "inpaint9", "sdxl_inpaint", "controlnet",
                  "sdxl_controlnet", "controlnet_img2img", "pix2pix", "sd_upscale", "flux_fill",
                  "flux_kontext"]  # fmt: skip


@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
@pytest.mark.parametrize("family", FROM_A_PICTURE)
def test_every_prompt_gets_its_own_picture(family, kind):
    tiny = build(family)
    tiny.arguments["output_type"] = "np"
    best = BestOfN(tiny.pipe, formula_scorer(), batch_size=3)
    common = {
        name: value
        for name, value in tiny.arguments.items()
        if name not in ("prompt", "image", "mask_image", "control_image")
    }
    given = {"image": pictures(3)}
    if "mask_image" in tiny.arguments:
        given["mask_image"] = masks(3)
    if "control_image" in tiny.arguments:
        given["control_image"] = pictures(3)[::-1]
    together = {name: value if kind == "list" else tensor(value, kind) for name, value in given.items()}
    outputs = best(["a", "b", "c"], n=3, **together, **common)
    for i, out in enumerate(outputs):
        alone = best("abc"[i], n=3, **{name: value[i] for name, value in given.items()}, **common)
        for record, same in zip(out.records, alone.records, strict=True):
            assert difference(record.picture, same.picture) <= 1e-4
        solo = tiny.pipe(
            prompt="abc"[i], **{name: value[i] for name, value in given.items()}, **common,
            generator=torch.Generator().manual_seed(out.records[1].seed),
        ).images[0]  # fmt: skip
        assert difference(out.records[1].picture, solo) <= 1e-4


@pytest.mark.parametrize("family", FROM_A_PICTURE)
def test_several_pictures_for_one_prompt_are_refused_before_any_denoising(family):
    tiny = build(family)
    best = BestOfN(tiny.pipe, formula_scorer())
    denoiser = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    denoiser.register_forward_pre_hook(lambda *_: pytest.fail("denoised"))
    for many in (pictures(2), tensor(pictures(2), "tensor")):
        with pytest.raises(ValueError, match="Expected one image for one prompt, but got 2"):
            best(n=2, **tiny.arguments | {"image": many})
        with pytest.raises(ValueError, match="Expected one image for each of 3 prompts, but got 2"):
            best(n=2, **tiny.arguments | {"image": many, "prompt": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="but got 2 lists"):
        best(n=2, **tiny.arguments | {"image": [pictures(1)] * 2, "prompt": ["a", "b", "c"]})


def test_one_picture_is_for_every_prompt():
    tiny = build("img2img")
    best = BestOfN(tiny.pipe, formula_scorer())
    common = {name: value for name, value in tiny.arguments.items() if name != "prompt"}
    outputs = [best(["a", "b"], n=2, **common | {"image": image}) for image in (picture(), [picture()])]
    assert [out.scores for out in outputs[0]] == [out.scores for out in outputs[1]]
    assert outputs[0][1].scores == best("b", n=2, **common).scores


def test_embeddings_are_shared_out_too(sd):
    best = BestOfN(sd.pipe, formula_scorer())
    common = {name: value for name, value in sd.arguments.items() if name != "prompt"}
    negative = torch.cat([embedding(32, 7, 16), embedding(32, 8, 16)])
    outputs = best(["a", "b"], n=2, negative_prompt_embeds=negative, **common)
    for i, text in enumerate("ab"):
        assert best(text, n=2, negative_prompt_embeds=negative[i : i + 1], **common).scores == outputs[i].scores
    assert outputs[0].scores != outputs[1].scores
    for wrong in (negative, torch.cat([negative, negative])):
        with pytest.raises(ValueError, match="Expected one prompt_embeds for one prompt"):
            best(n=2, prompt_embeds=wrong, **common)


def test_arguments_of_one_value_keep_it():
    """A list that belongs to the call as a whole, though it is as long as the prompts."""
    tiny = build("sd3")
    best = BestOfN(tiny.pipe, formula_scorer())
    common = {n: v for n, v in tiny.arguments.items() if n not in ("prompt", "num_inference_steps")}
    outputs = best(["a", "b"], n=2, sigmas=[1.0, 0.4], num_inference_steps=2, **common)
    alone = best("b", n=2, sigmas=[1.0, 0.4], num_inference_steps=2, **common)
    assert outputs[1].scores == alone.scores
    assert outputs[0].denoiser_rows == 2 * 2 * 2


def test_a_pipeline_that_was_not_tested_may_mean_either():
    class Own(diffusers.StableDiffusionImg2ImgPipeline):
        """Somebody's own."""

    parts = build("img2img")
    pipe = Own(**parts.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    best = BestOfN(pipe, formula_scorer())
    common = {name: value for name, value in parts.arguments.items() if name not in ("prompt", "image")}
    with pytest.raises(ValueError, match="as a list of lists"):
        best(["a", "b"], n=2, image=pictures(2), **common)
    outputs = best(["a", "b"], n=2, image=[[image] for image in pictures(2)], **common)
    assert outputs[1].scores == best("b", n=2, image=pictures(2)[1], **common).scores


def test_names_that_the_pipe_shares_with_best_of_n(sd):
    class Seeded(type(sd.pipe)):
        def __call__(self, prompt=None, generator=None, seed=None, **options):
            assert seed == 5
            return super().__call__(prompt, generator=generator, **options)

    pipe = Seeded(**sd.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert len(BestOfN(pipe, formula_scorer())("a", n=1, pipe_arguments={"seed": 5}).images) == 1


def test_seeds_that_pytorch_does_not_take_are_refused_before_any_denoising(sd):
    sd.pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("denoised"))
    for options in ({"seeds": [1, 2**65]}, {"seeds": [-(2**64), 1]}, {"seed": 2**64 - 1}):
        with pytest.raises(ValueError, match="which PyTorch takes"):
            BestOfN(sd.pipe, formula_scorer())(n=2, **options, **sd.arguments)
