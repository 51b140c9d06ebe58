"""`VisualQualityR1Block`: previews in a modular diffusers pipeline, which has no callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks
from torch import Tensor

from vqr1_metric.integrations.diffusers.callback import PreviewRecord
from vqr1_metric.integrations.diffusers.decoding import check_decoding
from vqr1_metric.integrations.diffusers.decoding import decode as decode_known
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, check_previews, clean_prediction
from vqr1_metric.integrations.diffusers.scoring import PictureScorer

_NAME, _BEFORE = "visual_quality_r1", "after_denoiser"


class VisualQualityR1Block(ModularPipelineBlocks):
    """Scores the predicted clean pictures at chosen steps of the denoising loop of a modular pipeline.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer.
        every: preview after every so many steps.
        at_step: preview after the step of this index, from 0. Give this or ``every``.
        decode: a function of the pipe and latents that gives PIL pictures, for pipelines whose latents are packed.
        frames: frames scored of a video.

    Attributes:
        records: one :class:`~vqr1_metric.integrations.diffusers.callback.PreviewRecord` for each preview of each
            candidate of the last run.

    Example:
        >>> blocks, previews = StableDiffusionXLAutoBlocks(), VisualQualityR1Block(metric, every=5)  # doctest: +SKIP
        >>> previews.insert_into(blocks)  # doctest: +SKIP
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")  # doctest: +SKIP
    """

    def __init__(
        self,
        metric: Any,
        *,
        every: int | None = None,
        at_step: int | None = None,
        decode: Callable[[Any, Tensor], Sequence[Any]] | None = None,
        frames: int = 4,
    ) -> None:
        if (every is None) == (at_step is None):
            raise ValueError("Expected exactly one of every and at_step.")
        if (every is not None and every < 1) or (at_step is not None and at_step < 0):
            raise ValueError(f"Expected every of at least 1, or at_step of at least 0, but got {every}, {at_step}.")
        super().__init__()
        self.picture_scorer = PictureScorer(metric, frames)
        self.every, self.at_step, self._decode = every, at_step, decode
        self.records: list[PreviewRecord] = []

    @property
    def description(self) -> str:
        """What diffusers prints of the block."""
        return "step within the denoising loop that scores the predicted clean pictures"

    def insert_into(self, blocks: Any) -> int:
        """Put the block before the scheduler step of every denoising loop within ``blocks``; gives their number.

        Call it before ``blocks.init_pipeline()``.
        """
        count = self._insert(blocks)
        if count == 0:
            raise UnsupportedError(f"{type(blocks).__name__} has no denoising loop with a block {_BEFORE!r}.")
        return count

    def _insert(self, blocks: Any) -> int:
        children = getattr(blocks, "sub_blocks", None) or {}
        if isinstance(blocks, LoopSequentialPipelineBlocks):
            if _BEFORE not in children:
                return 0
            children.insert(_NAME, self, list(children).index(_BEFORE))
            return 1
        return sum(self._insert(child) for child in list(children.values()))

    def __deepcopy__(self, memo: dict) -> VisualQualityR1Block:
        return self  # pipelines copy their blocks, and the records must stay in reach

    def _begin(self, components: Any, steps: int) -> None:
        self.records = []
        check_previews(components.scheduler)
        if self._decode is None:
            check_decoding(components)
        self.picture_scorer.load()
        first = self.every - 1 if self.every is not None else self.at_step
        if first >= steps:
            given = f"every={self.every}" if self.every is not None else f"at_step={self.at_step}"
            raise ValueError(f"Expected a preview within the {steps} steps of this run, but got {given}.")

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Called by the denoising loop before each scheduler step; what cannot work is refused at the first."""
        if i == 0:
            self._begin(components, len(block_state.timesteps))
        due = (i + 1) % self.every == 0 if self.every is not None else i == self.at_step
        if due:
            clean = clean_prediction(components.scheduler, block_state.noise_pred, t, block_state.latents)
            pictures = self._decode(components, clean) if self._decode else decode_known(components, clean, {})
            for candidate, (picture, result) in enumerate(zip(pictures, self.picture_scorer(pictures), strict=True)):
                self.records.append(PreviewRecord(i, candidate, result.score, picture, result))
        return components, block_state
