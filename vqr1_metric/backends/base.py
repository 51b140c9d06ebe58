"""What a scorer needs of a model, wherever that runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import VISUALQUALITY_R1, Question

#: A loaded model of transformers, or a part of one: of what those hold, torch tells type checkers only that it is a
#: tensor or a module.
Model = Any
#: What a question is about: one image ``(3, H, W)``, or several.
Asked = Tensor | tuple[Tensor, ...]


class ModelError(ValueError):
    """A model that cannot be found, loaded or used; the message says what to do."""


class ImageFailed(ModelError):
    """The model failed on one image, not as a whole: that image has no score, and the others go on."""


def told(error: BaseException) -> str:
    """What an error says, in one short line."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    text = " ".join(reason.split())
    return (text if len(text) <= 200 else text[:197] + "...") or type(error).__name__


@contextmanager
def as_model_error(subject: object, problem: str) -> Iterator[None]:
    """Raise whatever goes wrong inside as a :class:`ModelError` of one sentence: a model's files may hold anything."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{subject}: {problem} ({type(error).__name__}: {told(error)}).") from error


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled.

    Args:
        num_samples: replies for each picture, K.
        temperature: above 0; 1.0 as in training.
        top_k, top_p: keep the k most probable tokens (0 for all), then the smallest set holding the mass p.
        max_new_tokens: a reply is cut here.
        seed: reply k of an image follows from the image's pixels, ``seed`` and k alone, see :meth:`seeds`.
    """

    num_samples: int = 6
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                "Expected num_samples and max_new_tokens of at least 1, but got "
                f"{self.num_samples} and {self.max_new_tokens}."
            )
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Expected temperature > 0, top_k >= 0 and top_p in (0, 1], but got {self.temperature}, {self.top_k}, "
                f"{self.top_p}."
            )

    def seeds(self, image: Tensor) -> list[int]:
        """Seeds of the K replies about one image, each of 63 bits.

        A seed follows from the image's pixels, the seed of the sampling and the number of the reply, and from nothing
        else: images have independent random numbers, and the same ones in whatever batch and order they come. Seeds
        that did not know the image would give all images the same noise, and a mean over images would be far less
        certain than it looks.

        Args:
            image: ``(3, H, W)``, uint8 or floating in [0, 1]; both forms of an image have the same seeds.
        """
        # In 16 bits, which hold uint8 exactly and tell floats apart that differ by more than 1e-5.
        wide = image.detach().to(torch.float32) * (65_535 if image.is_floating_point() else 257)
        content = hashlib.blake2b(str(tuple(image.shape)).encode())
        content.update(wide.round().to("cpu", torch.int32).contiguous().numpy().tobytes())

        def seed(reply: int) -> int:
            stream = content.copy()
            stream.update(f"|{self.seed}|{reply}".encode())
            return int.from_bytes(stream.digest()[:8], "big") >> 1

        return [seed(reply) for reply in range(self.num_samples)]


def backend_identity(backend: ScoringBackend) -> dict[str, object]:
    """All that decides what a backend answers, but for the pixel limits: what it says itself, or else its name."""
    identity = getattr(backend, "identity", None)
    if identity is not None:
        return dict(identity())
    config = backend.pixel_config
    preprocessor = [config.patch_size, config.merge_size, config.temporal_patch_size, *config.mean, *config.std]
    return {"model": backend.model_id, "revision": backend.revision, "preprocessor": preprocessor}


@runtime_checkable
class ScoringBackend(Protocol):
    """A model that can state score distributions and write replies.

    Pictures are ``(3, H, W)`` tensors, uint8 or floating in [0, 1], of any sizes and devices, already checked. A model
    may say in ``batch_tokens`` and ``batch_visual_tokens`` how large a batch suits it, and raises
    ``torch.OutOfMemoryError`` for one that is too large.

    It should have ``identity() -> dict``: all that decides what it answers, but for the pixel limits, as JSON values,
    by content and without secrets. One without goes by its name and revision.
    """

    @property
    def model_id(self) -> str:
        """What was loaded: hub name or folder; an attribute will do."""
        ...

    #: The commit or content hash it had.
    revision: str
    #: The model's own preprocessing; a caller may pass one with other pixel limits.
    pixel_config: PixelConfig

    def sequence_length(self, visual_tokens: int, thinking: bool, question: Question = VISUALQUALITY_R1) -> int:
        """Tokens one picture costs in :meth:`distributions`, the question and the answer tree included."""
        ...

    def distributions(
        self,
        images: Sequence[Asked],
        pixel_config: PixelConfig,
        *,
        replies: Sequence[str] | None = None,
        question: Question | Sequence[Question] = VISUALQUALITY_R1,
    ) -> ScoreDistribution:
        """Score distributions in one forward pass, leading shape ``(B,)``.

        With ``replies`` (texts up to, not including, the answer tag) the question is the thinking one and the
        distribution is that of the answer after each text; without, the non-thinking question is asked. ``question`` is
        one for all images, or one for each with the same answers; a backend that knows VisualQuality-R1's alone may
        leave it out. An image is a tuple of them where the question is about several.
        """
        ...

    def sample_replies(
        self,
        images: Sequence[Tensor],
        pixel_config: PixelConfig,
        sampling: Sampling,
        *,
        thinking: bool,
        add_vision_id: bool,
        question: Question = VISUALQUALITY_R1,
    ) -> list[list[str]]:
        """K sampled replies for each picture."""
        ...
