"""Teach a diffusion pipeline to make pictures that score higher, by gradients of the score (as ReFL and DRaFT do).

    python examples/reward_backprop.py

runs in well under a minute on a CPU with a random pipeline and the embedded model. The same for real pipelines, with
low-rank adapters, on a GPU (pip install peft):

    python examples/reward_backprop.py --pipe stabilityai/stable-diffusion-xl-base-1.0 --rank 8 \\
        --model TianheWu/VisualQuality-R1-7B --size 1024 --steps 20 --last 1 --batch-size 1 --learning-rate 1e-4

and with --pipe black-forest-labs/FLUX.1-dev and otherwise the same options.

The expected score is differentiable from the picture's pixels on; the gradient goes on through the decoder and the last
K denoising steps into the denoiser's weights (DRaFT-K, arXiv 2309.17400; ReFL, arXiv 2304.05977, takes one step). The
seeds that are judged are never trained on.

A pipeline that learns from a score learns to please it: look at the pictures as well. Nothing here keeps them near
those of the untrained model; a real run adds early stopping or a penalty, and other judges.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from best_of_n import load_pipe
from torch import Tensor

from vqr1_metric import QualityScorer

HELD_OUT = list(range(10_000, 10_016))


def denoiser_of(pipe: Any) -> torch.nn.Module:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def generate(pipe: Any, seeds: list[int], last: int, **arguments: Any) -> Tensor:
    """Pictures ``(len(seeds), 3, H, W)`` in [0, 1], with the graph of the last ``last`` steps if gradients are on.

    They are those of ``pipe(...)``: what runs is the pipe's own code, without the ``no_grad`` that it is wrapped in.
    """
    denoiser, steps_done = denoiser_of(pipe), 0
    forward, wanted = denoiser.forward, torch.is_grad_enabled()

    def late_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(wanted and steps_done >= pipe.num_timesteps - last):
            return forward(*args, **kwargs)

    def count(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        nonlocal steps_done
        steps_done = step + 1
        return kwargs

    denoiser.forward = late_gradients
    try:
        output = type(pipe).__call__.__wrapped__(
            pipe,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            callback_on_step_end=count,
            **arguments,
        )
    finally:
        del denoiser.forward
    return output.images.float()


def trainable(pipe: Any, rank: int) -> list[torch.nn.Parameter]:
    """All weights of the denoiser, or with ``rank`` those of adapters on its attention; everything else is frozen."""
    for name in ("safety_checker", "watermark"):  # both work on finished pictures, where a gradient ends
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    denoiser = denoiser_of(pipe)
    if not rank:
        return list(denoiser.requires_grad_(True).parameters())
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    denoiser.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()  # steps as small as the learning rate vanish in half precision
    return weights


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a lighthouse at dusk")
    parser.add_argument("--pipe", default="tiny", help="name on the Hugging Face Hub, folder, or tiny")
    parser.add_argument("--model", default="nano", help="scoring model")
    parser.add_argument("--rank", type=int, default=0, help="of low-rank adapters; 0 trains the whole denoiser")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--last", type=int, default=2, help="steps that the gradient goes through, K")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default none for tiny, else the pipe's own")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="save held-out pictures before and after, as PNG")
    options = parser.parse_args(arguments)

    scorer = QualityScorer(options.model, device=options.device)
    pipe = load_pipe(options.pipe, options.device, offload=False)
    pipe.set_progress_bar_config(disable=True)
    weights = trainable(pipe, options.rank)
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate)
    guidance = 1.0 if options.guidance is None and options.pipe == "tiny" else options.guidance
    sampling = {"prompt": options.prompt, "num_inference_steps": options.steps}
    sampling |= {"height": options.size, "width": options.size}
    sampling |= {} if guidance is None else {"guidance_scale": guidance}

    def held_out() -> tuple[Tensor, Tensor]:
        parts = [HELD_OUT[i : i + options.batch_size] for i in range(0, len(HELD_OUT), options.batch_size)]
        with torch.no_grad():
            pictures = torch.cat([generate(pipe, seeds, options.last, **sampling) for seeds in parts])
        return torch.tensor([result.score for result in scorer.score(pictures)]), pictures

    before, pictures_before = held_out()
    print(f"held-out seeds before: {before.mean():.3f}")
    for update in range(options.updates):
        seeds = [update * options.batch_size + i for i in range(options.batch_size)]
        pictures = generate(pipe, seeds, options.last, **sampling)
        expected = scorer.distributions(pictures, differentiable=True).mean
        optimizer.zero_grad()
        (-expected.mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        print(f"update {update + 1:2d}: expected score {float(expected.detach().mean()):.3f}")
    after, pictures_after = held_out()
    rise = after - before
    print(f"held-out seeds after: {after.mean():.3f}")
    error = float(rise.std() / len(rise) ** 0.5)
    print(f"rise {rise.mean():.3f} +- {error:.3f} (standard error), {int((rise > 0).sum())} of {len(rise)} seeds rose")
    if options.out:
        strip = torch.cat([torch.cat(list(part[:8]), 2) for part in (pictures_before, pictures_after)], 1)
        pipe.image_processor.postprocess(strip[None], "pil", [False])[0].save(options.out)
        print(f"wrote {options.out}: before above, after below")
    return float(before.mean()), float(after.mean())


if __name__ == "__main__":
    main()
