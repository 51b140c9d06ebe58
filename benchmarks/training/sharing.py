"""A step of sampled RL2R with and without sharing. python -m benchmarks.training.sharing -o FILE.csv

The K replies of a picture show the model the same picture. With `share_pictures` (the default) the vision tower sees
each picture of a forward pass once. nano, LoRA off, so that the start model of the KL penalty has a tower of its own.
CPU seconds of this process for one step (after one that warms up), and what went through the tower (patches) and the
language model (tokens) of both models, in sampling, log-probabilities and the forward part of the update.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.training.setup import append, provenance
from vqr1_metric.train_ranker import trainer as trainer_module
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.run import prepare_data


def measure(folder: Path, options: argparse.Namespace, shared: str) -> tuple[float, int, int]:
    """CPU seconds of one step, and the patches and the tokens that went through both models in it."""
    config = RankerConfig.preset(
        "nano",
        objective="sampled",
        data=[str(folder / "ratings.csv")],
        output_dir=str(folder / f"out_{shared}"),
        images_per_device=options.images,
        images_per_comparison=options.images,
        num_generations=options.replies,
        micro_batch=options.micro_batch,
        validation_fraction=0.0,
        max_steps=2,
        share_pictures=shared != "nothing",
        log_replies=False,
        save_steps=100,
    )
    trainer = trainer_module.RankerTrainer(None, config, *prepare_data(config))
    patches, tokens, seconds = [], [], []
    for model in (trainer.loaded.model, trainer.accelerator.unwrap_model(trainer.ref_model)):
        # nano's tower sees whole pictures; of 32x32 pixels in each of 3 colours is one token
        model.model.visual.stem.register_forward_hook(lambda _, args, __: patches.append(args[0].numel() // 3072))
        mlp = model.model.language_model.layers[0].mlp
        mlp.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[:2].numel()))
    step = trainer.training_step

    def timed(*args, **kwargs):
        began = time.process_time()
        result = step(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return result

    trainer.training_step = timed
    trainer.train()
    half = len(seconds) // 2
    return sum(seconds[half:]), sum(patches) // 2, sum(tokens) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--replies", type=int, default=6)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[24, 6])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ["image,mos"]
        for i in range(options.images):
            small = Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            small.resize((options.size, options.size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
            lines.append(f"{i}.png,{i}")
        (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
        for size in options.micro_batch:
            for shared in ("nothing", "tower"):
                changed = argparse.Namespace(**{**vars(options), "micro_batch": size})
                seconds, patches, tokens = measure(folder, changed, shared)
                row = {
                    "images": options.images,
                    "replies": options.replies,
                    "size": options.size,
                    "micro_batch": size,
                    "shared": shared,
                    "cpu_seconds": round(seconds, 2),
                    "patches": patches,
                    "tokens": tokens,
                }
                print(row, flush=True)
                append(options.output, {**row, **provenance()})


if __name__ == "__main__":
    main()
