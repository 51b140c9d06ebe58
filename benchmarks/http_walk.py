"""What the threshold of the http backend costs: requests a picture, coverage and error, for answers of known spread.

    python benchmarks/http_walk.py

No server and no model: the next-token probabilities are those of a model whose scores d.dd are normal with the given
standard deviation, cut at 1 and 5. Means over 22 such distributions, with means from 1.6 to 4.5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from vqr1_metric.backends.answer_walk import AnswerWalk
from vqr1_metric.functional.distribution import score_grid

MEANS = [1.6 + 0.137 * i for i in range(22)]


def answers(mean: float, std: float) -> dict[str, float]:
    """Probability of each reply."""
    grid = score_grid().double()
    probabilities = (-0.5 * ((grid - mean) / std) ** 2).softmax(-1).tolist()
    return {f"<answer>{score:.2f}": p for score, p in zip(grid.tolist(), probabilities, strict=True)}


async def walk(mean: float, std: float, threshold: float) -> tuple[int, float, float]:
    """Requests, coverage and error of one picture."""
    replies, requests = answers(mean, std), 0

    def following(text: str) -> Mapping[str, float]:
        for tag, token in (("", "<"), ("<", "answer"), ("<answer", ">")):
            if text == tag:
                return {token: 1.0}
        masses: dict[str, float] = {}
        for reply, p in replies.items():
            if reply.startswith(text) and len(reply) > len(text):
                masses[reply[len(text)]] = masses.get(reply[len(text)], 0.0) + p
        return {token: p / sum(masses.values()) for token, p in masses.items()} or {"</": 1.0}

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
    exact = sum(float(reply.removeprefix("<answer>")) * p for reply, p in replies.items())
    return requests, float(read.coverage), abs(float(read.mean) - exact)


def main() -> None:
    """Print the table."""
    print("std   threshold  requests  coverage  mean error  largest error")
    for std in (0.15, 0.3, 0.5):
        for threshold in (0.05, 0.02, 0.01, 0.005, 0.002):
            runs = [asyncio.run(walk(mean, std, threshold)) for mean in MEANS]
            requests, coverage, error = (sum(column) / len(runs) for column in zip(*runs, strict=True))
            largest = max(run[2] for run in runs)
            print(f"{std:4.2f}  {threshold:9.3f}  {requests:8.1f}  {coverage:8.3f}  {error:10.4f}  {largest:13.4f}")


if __name__ == "__main__":
    main()
