"""Preparing the pictures of one step: for every reply and pass, or once. python benchmarks/speed/prepare_pictures.py

TRL asks its processor for the inputs of all replies twice in a step (to sample, and for the log-probabilities): 8
pictures with 6 replies are 96 preparations. The processor of `train_ranker` keeps the pictures of a step. CPU seconds
of this process, so that other work on the machine counts little; joining the patches of all replies is included.
"""

from __future__ import annotations

import argparse
import io
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.ratings import RatedImage
from vqr1_metric.train_ranker.processor import RankerProcessor

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def step_seconds(pictures: list[RatedImage], replies: int, cache_size: int) -> tuple[float, int]:
    """CPU seconds and decoded pictures of the two passes of a step."""
    loaded = SimpleNamespace(
        tokenizer=None,
        chat_template="",
        pixel_config=PixelConfig(14, 2, 2, 3136, 12845056, *CLIP),
        model=SimpleNamespace(config=SimpleNamespace(image_token_id=0, model_type="qwen2_5_vl")),
    )
    processor = RankerProcessor(loaded, pictures, cache_size=cache_size)
    start = time.process_time()
    for _ in range(2):
        if cache_size == 0:
            patches = []
            for image in (str(i) for i in range(len(pictures)) for _ in range(replies)):
                processor._cache.clear()
                patches.append(processor.patches(image)[0])
        else:
            patches = [processor.patches(str(i))[0] for i in range(len(pictures)) for _ in range(replies)]
        torch.cat(patches)
    return time.process_time() - start, processor.decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--replies", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 768), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random, pictures = np.random.default_rng(0), []
    for i in range(options.images):
        noise = random.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize(options.size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        pictures.append(RatedImage(str(i), float(i), where="made by code", data=file.getvalue))
    print("kept,cpu_seconds_per_step,pictures_prepared")
    for name, cache in (("no", 0), ("yes", options.images)):
        runs = [step_seconds(pictures, options.replies, cache) for _ in range(3)]
        print(f"{name},{min(seconds for seconds, _ in runs):.3f},{runs[0][1]}")


if __name__ == "__main__":
    main()
