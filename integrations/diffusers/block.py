"""`VisualQualityR1Block`: previews in a modular diffusers pipeline, which has no callbacks."""

from __future__ import annotations

import copy
from typing import Any

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks
from torch import Tensor

from vqr1_metric.integrations.diffusers.previews import Decode, PreviewRecord, Previews
from vqr1_metric.integrations.diffusers.private import AFTER_DENOISER
from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, clean_prediction

_NAME = "visual_quality_r1"


class VisualQualityR1Block(ModularPipelineBlocks):  # type: ignore[misc]
    """Scores the predicted clean pictures at chosen steps of the denoising loop of a modular pipeline.

    It watches: a preview that fails is a warning, and the run goes on.

    Args:
        metric: a metric with a ``scorer``, whose state is not touched, or a scorer.
        every: preview after every so many steps.
        at_step: preview after the step of this index, from 0. Give this or ``every``.
        decode: a function of the pipe and latents that gives PIL pictures, for pipelines that are not known here.
        frames: frames scored of a video.

    Attributes:
        records: one :class:`~vqr1_metric.integrations.diffusers.previews.PreviewRecord` for each preview of each
            candidate of the last run.
        failure: why a preview of the last run failed, or None.

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
        decode: Decode | None = None,
        frames: int = 4,
    ) -> None:
        if (every is None) == (at_step is None):
            raise ValueError("Expected exactly one of every and at_step.")
        if (every is not None and every < 1) or (at_step is not None and at_step < 0):
            raise ValueError(f"Expected every of at least 1, or at_step of at least 0, but got {every}, {at_step}.")
        super().__init__()
        self.previews = Previews(metric, frames, decode)
        self.every, self.at_step = every, at_step

    @property
    def records(self) -> list[PreviewRecord]:
        """One for each preview of each candidate of the last run."""
        return self.previews.records

    @property
    def failure(self) -> str | None:
        """Why a preview of the last run failed, or None."""
        return self.previews.failure

    @property
    def description(self) -> str:
        """What diffusers prints of the block."""
        return "step within the denoising loop that scores the predicted clean pictures"

    def insert_into(self, blocks: Any) -> int:
        """Put the block before the scheduler step of every denoising loop within ``blocks``; gives their number.

        Call it before ``blocks.init_pipeline()``. Only this object changes: what it shares with others of its class is
        copied first.
        """
        count = _edit(blocks, self)
        if count == 0:
            raise UnsupportedError(f"{type(blocks).__name__} has no denoising loop with a block {AFTER_DENOISER!r}.")
        return count

    def remove_from(self, blocks: Any) -> int:
        """Take it out again; gives the number of loops that held it."""
        return _edit(blocks, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> VisualQualityR1Block:
        return self  # pipelines copy their blocks, and the records must stay in reach

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Called by the denoising loop before each scheduler step."""
        if i == 0:
            self._begin(components, len(block_state.timesteps))
        due = (i + 1) % self.every == 0 if self.every is not None else i == self.at_step
        if due and self.failure is None:
            try:
                clean = clean_prediction(components.scheduler, block_state.noise_pred, t, block_state.latents)
            except Exception as error:
                self.previews.fail(error)
            else:
                told = getattr(block_state, "img_ids", None)
                self.previews.take(
                    components, i, clean, getattr(block_state, "latent_ids", None) if told is None else told
                )
        return components, block_state

    def _begin(self, components: Any, steps: int) -> None:
        self.previews.records, self.previews.failure = [], None
        try:
            self.previews.check(components)
            first = self.every - 1 if self.every is not None else self.at_step
            if first is not None and first >= steps:
                given = f"every={self.every}" if self.every is not None else f"at_step={self.at_step}"
                raise ValueError(f"Expected a preview within the {steps} steps of this run, but got {given}.")
        except Exception as error:
            self.previews.fail(error)


def _edit(blocks: Any, block: VisualQualityR1Block | None) -> int:
    """Insert the block into the loops within ``blocks``, or take it out; children are copied, never changed."""
    children = getattr(blocks, "sub_blocks", None)
    if not children:
        return 0
    own, count = copy.copy(children), 0
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        if block is None:
            count = int(own.pop(_NAME, None) is not None)
        elif AFTER_DENOISER in own:
            own.insert(_NAME, block, list(own).index(AFTER_DENOISER))
            count = 1
    else:
        for name, child in children.items():
            mine = copy.copy(child)
            found = _edit(mine, block)
            if found:
                own[name] = mine
                count += found
    if count:
        blocks.sub_blocks = own
    return count
