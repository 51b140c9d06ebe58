"""Teach a diffusion pipeline to make pictures that score higher, by gradients of the score (as ReFL and DRaFT do).

    python examples/reward_backprop.py

runs in well under a minute on a CPU with a random pipeline and the embedded model. The expected score is differentiable
from the picture's pixels on; the gradient goes on through the decoder and the last K denoising steps into the
denoiser's weights (DRaFT-K, arXiv 2309.17400; ReFL, arXiv 2304.05977, takes one step). The seeds that are judged are
never trained on.

A pipeline that learns from a score learns to please it: look at the pictures as well. Nothing here keeps them near
those of the untrained model; a real run adds low-rank adapters, early stopping or a penalty, and other judges.
"""

import argparse
from pathlib import Path

import torch
from tiny_pipeline import tiny_stable_diffusion
from torch import Tensor

from vqr1_metric import QualityScorer


def generate(pipe, prompt_embeds: Tensor, seeds: list[int], size: int, steps: int, last: int) -> Tensor:
    """Pictures ``(len(seeds), 3, size, size)`` in [0, 1] with the graph of the last ``last`` steps."""
    scheduler, shape = pipe.scheduler, (4, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise) * scheduler.init_noise_sigma
    embeds = prompt_embeds.expand(len(seeds), -1, -1)
    scheduler.set_timesteps(steps)
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= steps - last):
            prediction = pipe.unet(latents, timestep, encoder_hidden_states=embeds).sample
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((decoded + 1) / 2).clamp(0, 1)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="scoring model")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--last", type=int, default=2, help="steps that the gradient goes through, K")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="save held-out pictures before and after, as PNG")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # so small that threads would only wait for each other
    scorer = QualityScorer(options.model, device="cpu")
    pipe = tiny_stable_diffusion()
    pipe.vae.requires_grad_(False)
    prompt_embeds, _ = pipe.encode_prompt("a lighthouse at dusk", "cpu", 1, False)
    prompt_embeds = prompt_embeds.detach()
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=options.learning_rate)
    sampling = (options.size, options.steps, options.last)

    def held_out() -> tuple[float, Tensor]:
        with torch.no_grad():
            pictures = generate(pipe, prompt_embeds, list(range(10_000, 10_016)), *sampling)
        return sum(result.score for result in scorer.score(pictures)) / len(pictures), pictures

    before, pictures_before = held_out()
    print(f"held-out seeds before: {before:.3f}")
    for update in range(options.updates):
        seeds = [update * options.batch_size + i for i in range(options.batch_size)]
        pictures = generate(pipe, prompt_embeds, seeds, *sampling)
        expected = scorer.distributions(pictures, differentiable=True).mean
        optimizer.zero_grad()
        (-expected.mean()).backward()
        torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
        optimizer.step()
        print(f"update {update + 1:2d}: expected score {float(expected.detach().mean()):.3f}")
    after, pictures_after = held_out()
    print(f"held-out seeds after: {after:.3f}")
    if options.out:
        strip = torch.cat([torch.cat(list(part[:8]), 2) for part in (pictures_before, pictures_after)], 1)
        pipe.image_processor.postprocess(strip[None], "pil", [False])[0].save(options.out)
        print(f"wrote {options.out}: before above, after below")
    return before, after


if __name__ == "__main__":
    main()
