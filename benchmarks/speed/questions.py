"""What several questions about one image cost, against one: `python -m benchmarks.speed.questions`.

Interleaved: each round measures every number of questions once, in random order; the ratio of a round is against its
one question, and what is printed is the median of the rounds with the 2.5 and 97.5% points of its bootstrap. Times are
those of the thread's processor clock, so other programs on the machine count less.

The model beside nano is a Qwen2.5-VL of a quarter of the 7B's depth and widths, with random weights: tower and language
model have the share of work per visual token that they have there.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch

from benchmarks.speed.scoring_models import ARCHITECTURES, make_backend
from vqr1_metric.scorer import QualityScorer

ASKED = ("sharpness", "noise", "colour", "composition", "aesthetics")
#: A quarter of the 7B in depth and in every width.
QUARTER = (
    {
        "hidden_size": 896,
        "intermediate_size": 4736,
        "num_hidden_layers": 7,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "mrope_section": [8, 12, 12],
    },
    {"hidden_size": 320, "intermediate_size": 855, "depth": 8, "num_heads": 8, "fullatt_block_indexes": [1, 3, 5, 7]},
)


def cost(scorer: QualityScorer, image: torch.Tensor, count: int) -> float:
    """Processor seconds of ``count`` questions about an image."""
    start = time.process_time()
    scorer.ask(image, ASKED[:count])
    return time.process_time() - start


def measure(scorer: QualityScorer, side: int, rounds: int, seed: int = 0) -> dict[int, tuple[float, float, float]]:
    """For 2 to 5 questions the median ratio to one, and its interval."""
    generator = random.Random(seed)
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    counts = [1, 2, 3, 4, 5]
    for count in counts:
        cost(scorer, image, count)  # loads, builds the trees
    ratios: dict[int, list[float]] = {count: [] for count in (2, 3, 4, 5)}
    for _ in range(rounds):
        order = generator.sample(counts, len(counts))
        times = {count: cost(scorer, image, count) for count in order}
        for count in ratios:
            ratios[count].append(times[count] / times[1])
    draws = np.random.default_rng(seed)
    figures = {}
    for count, values in ratios.items():
        medians = [np.median(draws.choice(values, len(values))) for _ in range(1000)]
        figures[count] = (float(np.median(values)), *map(float, np.percentile(medians, [2.5, 97.5])))
    return figures


def main() -> None:
    """Measure nano and the quarter of a 7B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ARCHITECTURES["quarter"] = QUARTER
    print("| model | pixels | 2 questions | 3 | 4 | 5 |\n|---|---|---|---|---|---|")
    for name, side in (("nano", 512), ("quarter", 448)):
        scorer = QualityScorer("nano", device="cpu")
        if name == "quarter":
            scorer = QualityScorer(backend=make_backend(name, "cpu", "float32"))
        cells = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in measure(scorer, side, args.rounds).values()]
        print(f"| {name} | {side}x{side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
