"""The nodes. ComfyUI's pictures (IMAGE) are float tensors ``(B, H, W, C)`` in [0, 1]."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from vqr1_metric.results import Comparison, ImageScore
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

try:
    from comfy_execution.graph import ExecutionBlocker  # type: ignore[import-not-found]  # a part of ComfyUI, in no package
except ImportError:  # outside ComfyUI, and in one from before August 2024
    ExecutionBlocker = None

JUDGE = "VQR1_JUDGE"
_JUDGE_INPUT = (JUDGE, {"tooltip": "From VQR1 Judge."})


class _Judge:
    """A scorer, and whether it leaves the GPU between uses."""

    def __init__(self, scorer: QualityScorer, offload: bool) -> None:
        self.scorer, self.offload = scorer, offload

    def score(self, images: Tensor) -> list[ImageScore]:
        return self._run(self.scorer.score, images)

    def explain(self, images: Tensor) -> list[ImageScore]:
        return self._run(lambda batch: [self.scorer.explain(image) for image in batch], images)

    def _run(self, function: Callable[[Tensor], list[ImageScore]], images: Tensor) -> list[ImageScore]:
        try:
            # Samplers and upscalers overshoot; ComfyUI clamps the same way when it saves.
            return function(images.movedim(-1, 1).clamp(0, 1))
        finally:
            if self.offload:
                self.scorer.offload()


class VQR1Judge:
    """The model that judges; its weights load at the first use."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("STRING", {"default": DEFAULT_MODEL, "tooltip": "Hub name, folder, or nano (small, CPU)."}),
                "device": (["auto", "cuda", "cpu"],),
                "offload": ("BOOLEAN", {"default": True, "tooltip": "Move the weights to the CPU after each use."}),
            }
        }

    RETURN_TYPES = (JUDGE,)
    RETURN_NAMES = ("judge",)
    FUNCTION = "run"
    CATEGORY = "image/quality"

    def run(self, model: str, device: str, offload: bool) -> tuple[_Judge]:
        return (_Judge(QualityScorer(model.strip(), device=None if device == "auto" else device), offload),)


class _PictureNode:
    """What the nodes with a judge and pictures share."""

    EXTRA_INPUTS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"judge": _JUDGE_INPUT, "images": ("IMAGE",), **cls.EXTRA_INPUTS}}

    FUNCTION = "run"
    CATEGORY = "image/quality"


class VQR1Score(_PictureNode):
    """The score of every picture of a batch, 1 (very poor) to 5 (excellent)."""

    RETURN_TYPES = ("FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("mean", "scores", "text")
    OUTPUT_IS_LIST = (False, True, False)

    def run(self, judge: _Judge, images: Tensor) -> tuple[float, list[float], str]:
        results = judge.score(images)
        scores = [result.score for result in results]
        known = [score for score in scores if not math.isnan(score)]
        mean = sum(known) / len(known) if known else math.nan
        return mean, scores, "\n".join(_line(i, result) for i, result in enumerate(results))


class VQR1Compare:
    """Which of two pictures looks better, and how surely; of batches, picture by picture."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"judge": _JUDGE_INPUT, "a": ("IMAGE",), "b": ("IMAGE",)}}

    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("a_wins", "text")
    OUTPUT_IS_LIST = (True, False)
    FUNCTION = "run"
    CATEGORY = "image/quality"

    def run(self, judge: _Judge, a: Tensor, b: Tensor) -> tuple[list[float], str]:
        if len(a) != len(b):
            raise ValueError(f"Expected as many pictures in a as in b, but got {len(a)} and {len(b)}.")
        pairs = [Comparison.of(*pair) for pair in zip(judge.score(a), judge.score(b), strict=True)]
        lines = [
            f"{i}: {_said(pair)} (a {pair.a.score:.2f}, b {pair.b.score:.2f}, a wins {pair.win_probability:.0%})"
            for i, pair in enumerate(pairs)
        ]
        return [pair.win_probability for pair in pairs], "\n".join(lines)


class VQR1BestOfBatch(_PictureNode):
    """The best pictures of a batch, best first; pictures without a score come last."""

    EXTRA_INPUTS: ClassVar[dict[str, Any]] = {"count": ("INT", {"default": 1, "min": 1, "max": 4096})}
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "text")

    def run(self, judge: _Judge, images: Tensor, count: int) -> tuple[Tensor, str]:
        results = judge.score(images)
        order = sorted(range(len(results)), key=lambda i: (math.isnan(results[i].score), -results[i].score, i))
        return images[order[:count]], "\n".join(_line(i, results[i]) for i in order)


class VQR1Filter(_PictureNode):
    """Pictures that reach a score, and the others; an output without pictures stops what hangs on it.

    A picture without a score is among the others.
    """

    EXTRA_INPUTS: ClassVar[dict[str, Any]] = {
        "threshold": ("FLOAT", {"default": 3.5, "min": 1.0, "max": 5.0, "step": 0.05})
    }
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("passed", "rejected", "text")

    def run(self, judge: _Judge, images: Tensor, threshold: float) -> tuple[Any, Any, str]:
        results = judge.score(images)
        passed = [i for i, result in enumerate(results) if result.score >= threshold]
        rejected = [i for i in range(len(results)) if i not in passed]
        return _some(images, passed), _some(images, rejected), "\n".join(map(_line, range(len(results)), results))


class VQR1Reasoning(_PictureNode):
    """Why: the score and a sampled reasoning for every picture. Slow: the model writes some hundred words."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)

    def run(self, judge: _Judge, images: Tensor) -> tuple[str]:
        texts = []
        for index, result in enumerate(judge.explain(images)):
            # The readable reply whose score is nearest to the whole result speaks for it.
            readable = [reply for reply in result.replies if reply.reason is None and reply.reasoning]
            best = min(readable, key=lambda reply: abs(reply.score - result.score), default=None)
            texts.append(f"{_line(index, result)}\n{best.reasoning if best else 'The model gave no reasons.'}")
        return ("\n\n".join(texts),)


def _line(index: int, result: ImageScore) -> str:
    if result.error is not None:
        return f"{index}: no score ({result.error})"
    low, high = result.interval(0.9)
    return f"{index}: {result.score:.2f} (90 % between {low:.2f} and {high:.2f})"


def _said(pair: Comparison) -> str:
    words: dict[str | None, str] = {"a": "a is better", "b": "b is better", "tie": "a coin toss"}
    return words.get(pair.winner, "no comparison")


def _some(images: Tensor, indices: list[int]) -> Any:
    """These pictures; where there are none, ComfyUI's way to skip the nodes that follow."""
    return images[indices] if indices or ExecutionBlocker is None else ExecutionBlocker(None)


NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {
    "VQR1Judge": VQR1Judge,
    "VQR1Score": VQR1Score,
    "VQR1Compare": VQR1Compare,
    "VQR1BestOfBatch": VQR1BestOfBatch,
    "VQR1Filter": VQR1Filter,
    "VQR1Reasoning": VQR1Reasoning,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "VQR1Judge": "VQR1 Judge",
    "VQR1Score": "VQR1 Score",
    "VQR1Compare": "VQR1 Compare",
    "VQR1BestOfBatch": "VQR1 Best of Batch",
    "VQR1Filter": "VQR1 Filter by Threshold",
    "VQR1Reasoning": "VQR1 Reasoning",
}
for _kind in NODE_CLASS_MAPPINGS.values():
    _kind.DESCRIPTION = inspect.getdoc(_kind)  # ComfyUI shows it beside the node
