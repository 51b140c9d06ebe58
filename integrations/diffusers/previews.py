"""Previews while a pipe runs: the predicted clean latents decoded, scored and recorded; used by callback and block."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vqr1_metric.integrations.diffusers.schedulers import UnsupportedError, check_previews
from vqr1_metric.integrations.diffusers.scoring import PictureScorer
from vqr1_metric.integrations.diffusers.tested import tested
from vqr1_metric.results import ImageScore

Decode = Callable[[Any, Tensor], Sequence[Any]]


@dataclass(frozen=True)
class PreviewRecord:
    """One candidate at one step.

    Args:
        step: index of the step, from 0, after which the preview was made.
        candidate: row of the batch.
        score: of the predicted clean picture, in [1, 5]; NaN where there is none.
        preview: that picture; for a video a list of frames.
        result: the whole score.
    """

    step: int
    candidate: int
    score: float
    preview: Image.Image | list[Image.Image]
    result: ImageScore


class Previews:
    """Makes and keeps the previews of a run. It only watches: what fails is a warning, and the run goes on.

    Args:
        metric: a metric with a ``scorer``, or a scorer.
        frames: frames scored of a video.
        decode: a function of the pipe and latents that gives PIL pictures, for pipelines that are not known here.
        log: a function of a dictionary, a wandb run (``log``) or a TensorBoard ``SummaryWriter`` (``add_scalar``).
    """

    def __init__(self, metric: Any, frames: int, decode: Decode | None, log: Any = None) -> None:
        if log is not None and not (callable(log) or hasattr(log, "add_scalar") or hasattr(log, "log")):
            raise TypeError(
                f"Expected log to be a function, a wandb run or a SummaryWriter, but got {type(log).__name__}."
            )
        self.scorer, self.decode, self.log = PictureScorer(metric, frames), decode, log
        self.records: list[PreviewRecord] = []
        self.failure: str | None = None

    def check(self, pipe: Any) -> None:
        """Raise for a pipe whose previews cannot be made, and load the scoring model."""
        check_previews(pipe.scheduler)
        if self.decode is None and "decodes" not in (tested(pipe) or ()):
            raise UnsupportedError(
                f"There is no preview inside a run of {type(pipe).__name__}; use BestOfN, whose previews the pipe "
                "decodes itself, or pass decode=, a function of the pipe and latents that gives pictures."
            )
        self.scorer.load()

    def fail(self, error: Exception | str) -> None:
        """Warn, once a run."""
        if self.failure is None:
            self.failure = str(error) or type(error).__name__
            warnings.warn(f"No preview, and the run goes on: {self.failure}", stacklevel=3)

    def take(self, pipe: Any, step: int, clean: Tensor, positions: Any) -> list[float]:
        """Scores of the candidates at this step; none where the preview failed."""
        try:
            pictures = list(self.decode(pipe, clean)) if self.decode else decode(pipe, clean, positions)
            if len(pictures) != len(clean):
                raise ValueError(
                    f"Expected {len(clean)} pictures from decode, one a candidate, but got {len(pictures)}."
                )
            results = self.scorer(pictures)
            for candidate, (picture, result) in enumerate(zip(pictures, results, strict=True)):
                self.records.append(PreviewRecord(step, candidate, result.score, picture, result))
            scores = [result.score for result in results]
            known = [score for score in scores if math.isfinite(score)]
            if self.log is not None:
                mean = sum(known) / len(known) if known else math.nan
                best = max(known, default=math.nan)
                _write(self.log, step, {"vqr1/best": best, "vqr1/mean": mean, "vqr1/candidates": len(scores)})
        except Exception as error:  # decoders, scorers and loggers of any kind
            self.fail(error)
            return []
        return scores


def decode(pipe: Any, latents: Tensor, positions: Any = None) -> list[Any]:
    """Pictures (of a video: lists of frames) as PIL, decoded one after the other to save memory.

    Args:
        pipe: with a ``vae``, and an ``image_processor`` or ``video_processor``.
        latents: shape ``(candidates, ...)``, as they leave the scheduler.
        positions: for latents in a row of tokens, shape ``(candidates, tokens, channels)``: where each token lies, as
            the denoiser was told (``img_ids`` or ``img_shapes``).
    """
    vae, config = pipe.vae, pipe.vae.config
    upcast = vae.dtype == torch.float16 and config.get("force_upcast", False)
    if upcast:  # in a copy: others may decode with this one now
        vae = copy.deepcopy(vae).to(torch.float32)
    packed = latents.ndim == 3
    if packed:
        latents = _grid(latents, positions)
    if hasattr(vae, "bn"):  # Flux.2 normalises patches
        shape: tuple[int, ...] = (1, -1, 1, 1)
        variance = vae.bn.running_var + config.batch_norm_eps
        latents = latents * variance.sqrt().view(shape).to(latents) + vae.bn.running_mean.view(shape).to(latents)
    if packed:  # patches of 2 x 2
        b, c, h, w = latents.shape
        latents = latents.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
        latents = latents.unsqueeze(2) if "temperal_downsample" in config else latents  # a video decoder's single frame
    if not hasattr(vae, "bn"):
        latents = latents / config.get("scaling_factor", 1.0)
        if config.get("latents_mean") is not None:
            shape = (1, -1, *(1,) * (latents.ndim - 2))
            mean, std = (torch.tensor(config[key]).view(shape).to(latents) for key in ("latents_mean", "latents_std"))
            latents = latents * std + mean
        elif config.get("shift_factor") is not None:
            latents = latents + config.shift_factor
    with torch.no_grad():
        decoded = [vae.decode(row.to(vae.dtype), return_dict=False)[0] for row in latents.split(1)]
    if hasattr(pipe, "video_processor"):
        return [pipe.video_processor.postprocess_video(video, output_type="pil")[0] for video in decoded]
    pictures = [picture[:, :, 0] if picture.ndim == 5 else picture for picture in decoded]
    return [pipe.image_processor.postprocess(picture, output_type="pil")[0] for picture in pictures]


def _grid(tokens: Tensor, positions: Any) -> Tensor:
    """Tokens in their places: shape ``(candidates, channels, rows, columns)``."""
    count = tokens.shape[1]
    if isinstance(positions, Tensor):  # (tokens, 3 or 4), or so for each candidate: frame, row, column
        ids = positions.reshape(-1, positions.shape[-1])[:count].long().cpu()
        rows, columns = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
        place = (ids[:, 1] * columns + ids[:, 2]).argsort().to(tokens.device)
    elif positions:
        while not isinstance(positions[0], int):  # lists in lists: the first is that of the first candidate's picture
            positions = positions[0]
        rows, columns = positions[-2:]
        place = torch.arange(count, device=tokens.device)
    else:
        raise UnsupportedError("The denoiser was not told where each token of the latents lies; pass decode=.")
    if rows * columns != count:
        raise UnsupportedError(f"Expected {rows} x {columns} tokens, but got {count}; pass decode=.")
    return tokens[:, place].transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def _write(log: Any, step: int, values: dict[str, float]) -> None:
    if hasattr(log, "add_scalar"):
        for name, value in values.items():
            log.add_scalar(name, value, step)
    else:
        (log if callable(log) else log.log)(values | {"step": step})
