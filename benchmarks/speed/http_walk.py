"""What the threshold of the http backend costs: requests a picture, coverage and error, for answers of known spread.

    python benchmarks/speed/http_walk.py
    python benchmarks/speed/http_walk.py --model nano --pictures examples/pictures/lake*.jpg

No server. Without --model no model either: the next-token probabilities are those of a model whose scores d.dd are
normal with the given standard deviation, cut at 1 and 5; means over 22 such distributions, with means from 1.6 to 4.5.
With it they are a model's own for each picture, the 20 most probable as from a server, against its one-pass readout.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from vqr1_metric.backends.http.walk import AnswerWalk
from vqr1_metric.functional.distribution import score_grid
from vqr1_metric.images import load_image
from vqr1_metric.scorer import QualityScorer

TOP = 20  # what a server lists
MEANS = [1.6 + 0.137 * i for i in range(22)]


def answers(mean: float, std: float) -> dict[str, float]:
    """Probability of each reply."""
    grid = score_grid().double()
    probabilities = (-0.5 * ((grid - mean) / std) ** 2).softmax(-1).tolist()
    return {f"<answer>{score:.2f}": p for score, p in zip(grid.tolist(), probabilities, strict=True)}


def normal(mean: float, std: float) -> tuple[Callable[[str], Mapping[str, float]], float]:
    """What follows a text, and the exact mean."""
    replies = answers(mean, std)

    def following(text: str) -> Mapping[str, float]:
        for tag, token in (("", "<"), ("<", "answer"), ("<answer", ">")):
            if text == tag:
                return {token: 1.0}
        masses: dict[str, float] = {}
        for reply, p in replies.items():
            if reply.startswith(text) and len(reply) > len(text):
                masses[reply[len(text)]] = masses.get(reply[len(text)], 0.0) + p
        return {token: p / sum(masses.values()) for token, p in masses.items()} or {"</": 1.0}

    return following, sum(float(reply.removeprefix("<answer>")) * p for reply, p in replies.items())


def of_model(scorer: QualityScorer, picture: str) -> tuple[Callable[[str], Mapping[str, float]], float]:
    """The same from a model, for a picture."""
    backend, image = scorer.backend, load_image(picture)

    @cache
    def following(text: str) -> Mapping[str, float]:
        with torch.inference_mode():
            inputs = backend._inputs([image], scorer.pixel_config, False, [text], False)
            probabilities = backend.model(**inputs).logits[0, -1].double().softmax(-1)
        likely = probabilities.topk(TOP)
        texts = (backend.tokenizer.decode([token]) for token in likely.indices.tolist())
        return dict(reversed(list(zip(texts, likely.values.tolist(), strict=True))))  # of two equal texts the likelier

    return following, scorer.score(picture)[0].score


async def walk(
    following: Callable[[str], Mapping[str, float]], exact: float, threshold: float
) -> tuple[int, float, float]:
    """Requests, coverage and error of one picture."""
    requests = 0

    async def expand(text: str, tokens: int) -> Sequence[tuple[str, Mapping[str, float]]]:
        nonlocal requests
        requests += 1
        steps = []
        for _ in range(tokens):
            probabilities = following(text)
            steps.append((max(probabilities, key=probabilities.get), probabilities))
            text += steps[-1][0]
        return steps

    read = await AnswerWalk(expand, threshold).distribution()
    return requests, float(read.coverage), abs(float(read.mean) - exact)


def show(name: str, places: list[tuple[Callable[[str], Mapping[str, float]], float]]) -> None:
    """Print a line for each threshold."""
    for threshold in (0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        runs = [asyncio.run(walk(*place, threshold)) for place in places]
        requests, coverage, error = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        largest = max(run[2] for run in runs)
        print(f"{name:5} {threshold:9.3f}  {requests:8.1f}  {coverage:8.3f}  {error:10.4f}  {largest:13.4f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--pictures", nargs="+", default=[])
    args = parser.parse_args()
    print("std   threshold  requests  coverage  mean error  largest error")
    if args.model:
        scorer = QualityScorer(args.model)
        show(args.model, [of_model(scorer, picture) for picture in args.pictures])
        return
    for std in (0.15, 0.3, 0.5):
        show(f"{std:.2f}", [normal(mean, std) for mean in MEANS])


if __name__ == "__main__":
    main()
