"""`QualityScorer`: pictures in, score distributions out; comparing, ranking and explaining are made of those."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vqr1_metric.backends.base import ImageFailed, Sampling, ScoringBackend, backend_identity
from vqr1_metric.backends.loading import SharedModel, forget, newest, shared
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.spec import EMBEDDED, ModelSpec
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import ImageError, ImageLike, describe, load_image, split_images
from vqr1_metric.images.ahead import read_pictures
from vqr1_metric.images.find import ImageFinder
from vqr1_metric.protocol import MODES, PROMPT_VERSION, Mode, ParsedReply, parse_reply
from vqr1_metric.results import LOW_RELIABILITY, Comparison, ImageScore, RankedImage, rank_results

if torch.distributed.is_available():
    # Before there is a process group, as a rule: transformers imports it with the model, and its default arguments hold
    # the group of that moment. Its threads would outlive it and now and then abort the process as the interpreter ends.
    import torch.distributed.nn.functional

DEFAULT_MODEL = "TianheWu/VisualQuality-R1-7B"
#: Tokens of one forward pass, padding included, where the backend has no opinion of its own.
DEFAULT_BATCH_TOKENS = 16_384
#: A long run holds at most so many decoded pictures and pixels at a time.
_WINDOW_PICTURES, _WINDOW_PIXELS = 64, 64_000_000
#: A batch ends where padding would pass this share of it, once it holds this share of its tokens.
_PADDING, _ENOUGH = 0.05, 0.125

Outcome = TypeVar("Outcome")


class QualityScorer:
    """Scores pictures with a VisualQuality-R1 model, or any Qwen-VL model that answers the same question.

    The weights load at the first use and are shared by all scorers of one process that ask for the same ones. A scorer
    is a plain object: copying it copies no weights, pickling it pickles the recipe only.

    Args:
        model: Hugging Face Hub name, local folder (full model or LoRA adapter), or ``"nano"``, the embedded model.
        mode: ``"score"`` reads the distribution in one forward pass (deterministic, the default); ``"think"`` samples K
            reasonings and mixes the distributions of their answers; ``"sample"`` parses K sampled replies as the
            authors' scripts do.
        revision, dtype, device, device_map, quantization, attn_implementation: see
            :class:`~vqr1_metric.backends.loading.ModelSpec`.
        min_pixels, max_pixels: pictures outside are rescaled; None keeps the model's own limits.
        batch_tokens: tokens of one forward pass, padding included. None: 16,384 (ten pictures of one megapixel with a
            Qwen2.5-VL model) or what the free memory of the GPU allows, on a CPU what its caches hold. A batch that
            does not fit into memory is halved, and later ones are smaller.
        deterministic: put every picture through the model alone, so that its score does not depend, in its last digits,
            on which others it is scored with. Slower: a GPU is not filled by one picture.
        num_samples, temperature, top_k, top_p, max_new_tokens, seed: sampling in ``think`` and ``sample``, see
            :class:`~vqr1_metric.backends.base.Sampling`.
        thinking: whether ``sample`` asks the thinking question.
        add_vision_id: write "Picture 1: " before the picture, as the authors' scripts do and their training does not;
            None does so in ``sample`` mode only.
        backend: a ready :class:`~vqr1_metric.backends.base.ScoringBackend`, instead of ``model``.

    Example:
        >>> scorer = QualityScorer("nano")  # doctest: +SKIP
        >>> scorer.score("photo.jpg")[0].score  # doctest: +SKIP
        3.87
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        mode: Mode = "score",
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        attn_implementation: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        batch_tokens: int | None = None,
        deterministic: bool = False,
        num_samples: int = 6,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        thinking: bool = False,
        add_vision_id: bool | None = None,
        backend: ScoringBackend | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Expected mode to be one of {', '.join(MODES)}, but got {mode!r}.")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"Expected batch_tokens of at least 1, but got {batch_tokens}.")
        self.spec = ModelSpec(
            model,
            revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
        self.mode: Mode = mode
        self.sampling = Sampling(num_samples, temperature, top_k, top_p, max_new_tokens, seed)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.batch_tokens = batch_tokens
        self.deterministic = deterministic
        self.thinking = thinking
        self.add_vision_id = mode == "sample" if add_vision_id is None else add_vision_id
        self._given_backend = backend
        self._shared: SharedModel | None = None  # the model as its files were when this scorer first used it
        self._warned = False
        self._fitting_tokens: int | None = None  # what a batch that did not fit into memory was cut to

    # ---------------------------------------------------------------- scoring

    def score(
        self, images: ImageLike | Sequence[ImageLike], *, on_error: Literal["nan", "raise"] = "nan"
    ) -> list[ImageScore]:
        """Score pictures, in input order.

        Args:
            images: a tensor ``(B, C, H, W)`` or ``(C, H, W)`` (uint8, or floating in [0, 1], any device), a path,
                bytes, a PIL picture, an array, or a list of these with any sizes.
            on_error: ``"nan"`` gives a bad picture the score NaN and its reason; ``"raise"`` raises
                :class:`~vqr1_metric.images.ImageError` at the first, before anything is scored.
        """
        images = split_images(images)
        if on_error == "raise":
            images = [load_image(image, describe(image, i)) for i, image in enumerate(images)]
        elif on_error != "nan":
            raise ValueError(f"Expected on_error 'nan' or 'raise', but got {on_error!r}.")
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageLike], *, in_order: bool = True) -> Iterator[ImageScore]:
        """Like :meth:`score`, one result after the other, in memory that does not grow with the number of pictures.

        Args:
            images: as for :meth:`score`.
            in_order: give the results in the order of the images. False gives those of a batch as soon as it has been
                through the model: within 64 images, those of like size come together.
        """
        names: list[str] = []
        window: list[Tensor | ImageError] = []
        held = 0
        for name, pixels in read_pictures(images):
            names.append(name)
            window.append(pixels)
            held += 0 if isinstance(pixels, ImageError) else pixels[0].numel()
            if len(window) >= _WINDOW_PICTURES or held >= _WINDOW_PIXELS:
                yield from self._score_window(names, window, in_order)
                names, window, held = [], [], 0
        yield from self._score_window(names, window, in_order)

    def score_folder(self, folder: str | os.PathLike[str], *, recursive: bool = True) -> Iterator[ImageScore]:
        """Stream the images of a folder, sorted, files decoded ahead.

        A file or folder that cannot be read is a result with the reason. For a file of scores that can be resumed see
        :func:`~vqr1_metric.score_runs.score_to_file`.

        Args:
            folder: its files with an image's suffix count, hidden ones do not.
            recursive: with its subfolders.
        """
        found = list(ImageFinder([folder], recursive=recursive))
        problems = [ImageScore.failed(one.name, f"{one.name}: {one.problem}") for one in found if one.problem]
        yield from self.stream([one.name for one in found if not one.problem])
        yield from problems

    def distributions(
        self, images: ImageLike | Sequence[ImageLike], *, differentiable: bool = False
    ) -> ScoreDistribution:
        """Score distributions read out in one forward pass per batch (whatever ``mode`` says), leading shape ``(B,)``.

        Args:
            images: as for :meth:`score`; a bad one, or one too large for the memory, raises
                :class:`~vqr1_metric.images.ImageError`.
            differentiable: keep the autograd graph from the pixels of floating tensors to the distribution. The weights
                are frozen and get no gradient. Every batch's activations stay in memory until the backward pass.
        """
        pixels = [load_image(image, describe(image, i)) for i, image in enumerate(split_images(images))]
        if not pixels:
            raise ImageError("Expected at least one picture, but got none.")
        parts: list[tuple[list[int], ScoreDistribution]] = []
        with torch.set_grad_enabled(differentiable):
            for batch, part in self._run(pixels, lambda batch: self._backend_distributions([pixels[i] for i in batch])):
                if isinstance(part, ImageError):
                    raise ImageError(f"image {batch[0]}: {part}")
                parts.append((batch, part))
        order = torch.tensor([i for batch, _ in parts for i in batch]).argsort()
        tensors = [torch.cat([getattr(part, name) for _, part in parts]) for name in _DISTRIBUTION_FIELDS]
        return ScoreDistribution(*(tensor[order.to(tensor.device)] for tensor in tensors))

    def compare(self, a: ImageLike, b: ImageLike) -> Comparison:
        """Which of two pictures looks better, and how surely."""
        return Comparison.of(*self.score([a, b]))

    def rank(self, images: ImageLike | Sequence[ImageLike]) -> list[RankedImage]:
        """Pictures ordered best first, ties marked where a comparison is a coin toss."""
        return rank_results(self.score(images))

    def explain(self, image: ImageLike) -> ImageScore:
        """The score with sampled reasonings in ``replies``.

        A model that writes no readable reasoning (a non-thinking one, such as the embedded model) gets its one-pass
        score, and ``replies`` whose ``reason`` says what was wrong with them.
        """
        thought = self.replace(mode="think").score(image)[0]
        if thought.error is None or not thought.replies:
            return thought
        scored = self.replace(mode="score").score(image)[0]
        return ImageScore.of(scored.name, scored.distribution, thought.replies) if scored.error is None else scored

    # ---------------------------------------------------------------- the model

    @property
    def backend(self) -> ScoringBackend:
        """The model, loaded now if it was not."""
        if self._given_backend is not None:
            return self._given_backend

        from vqr1_metric.backends.transformers import TransformersBackend

        with torch.inference_mode(False):  # weights loaded or moved in inference mode could never pass a gradient on
            backend = self._model().load(TransformersBackend)
            backend.to_own_device()
        return backend

    @property
    def pixel_config(self) -> PixelConfig:
        """The model's preprocessing, with this scorer's pixel limits; known before the weights load."""
        own = self._model().pixel_config if self._given_backend is None else self._given_backend.pixel_config
        return own.with_limits(self.min_pixels, self.max_pixels)

    @property
    def loaded(self) -> bool:
        """Are the weights in memory?"""
        model = self._shared or newest(self.spec)
        return self._given_backend is not None or (model is not None and model.backend is not None)

    def offload(self) -> None:
        """Move the weights to the CPU, for all scorers that share them; the next use brings them back."""
        model = self._shared or newest(self.spec)
        if self._given_backend is None and model is not None and model.backend is not None:
            with torch.inference_mode(False):
                model.backend.offload()

    def unload(self) -> None:
        """Drop the weights, for all scorers that share them; the next use loads them again.

        This scorer then takes the files as they are. Another one that has used them refuses if they have changed.
        """
        if self._shared is not None:
            self._shared.backend = None
            self._shared = None
        forget(self.spec)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def identity(self) -> dict[str, object]:
        """Everything that decides a score, and nothing else: two scorers with one identity give the same scores.

        By content and as resolved: hashes of weights, adapter, tokenizer, chat template, preprocessing and
        configuration, never their path; the dtype that None means here; pixel limits of the model where none were
        given; the question; sampling only in a mode that samples; of a server its address, model and options. Where
        the model runs is no part of it, nor what only changes the speed.

        All values can be written as JSON. No weights are loaded, but those of a model on the Hub are downloaded. It
        stays the same as long as this scorer is not unloaded: one whose files were overwritten meanwhile refuses to
        load the new ones.

        Raises:
            ModelError: if the model cannot be found.
        """
        given, limits = self._given_backend, self.pixel_config
        sampling = None
        if self.mode != "score":
            thinking = self.mode == "think" or self.thinking
            sampling = {**asdict(self.sampling), "thinking": thinking, "add_vision_id": self.add_vision_id}
        return {
            **(self._model().identity if given is None else backend_identity(given)),
            "min_pixels": limits.min_pixels,
            "max_pixels": limits.max_pixels,
            "question": PROMPT_VERSION,
            "mode": self.mode,
            "sampling": sampling,
            "deterministic": self.deterministic,
        }

    @property
    def fingerprint(self) -> int:
        """A 48-bit number made of :meth:`identity` (exact in float64 too)."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def card(self) -> dict[str, object]:
        """What to write beside scores: ``model`` and ``revision`` to read, ``identity`` to compare.

        A local model goes by its folder's path, one on the Hub or a server by its name. The revision is the commit on
        the Hub, a hash of the folder's content, or ``"served"``.
        """
        given = self._given_backend
        if given is not None:
            model, revision = given.model_id, given.revision
        else:
            folder = None if self.spec.model in EMBEDDED else self.spec.folder
            model, revision = str(folder.resolve()) if folder else self.spec.model, self._model().revision
        return {"model": model, "revision": revision, "identity": self.identity()}

    def _model(self) -> SharedModel:
        if self._shared is None:
            self._shared = shared(self.spec)
        return self._shared

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shared": None}

    def replace(self, *, mode: Mode) -> QualityScorer:
        """The same scorer in another mode, sharing the weights."""
        if mode not in MODES:
            raise ValueError(f"Expected mode to be one of {', '.join(MODES)}, but got {mode!r}.")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, mode=mode)
        return other

    def __copy__(self) -> QualityScorer:
        return self

    def __deepcopy__(self, memo: dict) -> QualityScorer:
        return self

    def __repr__(self) -> str:
        name = self.spec.model if self._given_backend is None else self._given_backend.model_id
        return f"{type(self).__name__}({name!r}, mode={self.mode!r})"

    # ---------------------------------------------------------------- batches

    def _score_window(
        self, names: list[str], window: list[Tensor | ImageError], in_order: bool
    ) -> Iterator[ImageScore]:
        ready = {i: ImageScore.failed(names[i], str(e)) for i, e in enumerate(window) if isinstance(e, ImageError)}
        good = [i for i in range(len(window)) if i not in ready]
        following = 0

        def score(batch: list[int]) -> list[ImageScore]:
            indices = [good[i] for i in batch]
            return self._score_batch([names[i] for i in indices], [window[i] for i in indices])

        for batch, scores in self._run([window[i] for i in good], score):
            if isinstance(scores, ImageError):
                name = names[good[batch[0]]]
                scores = [ImageScore.failed(name, f"{name}: {scores}")]
            self._warn_if_unreliable(scores)
            ready.update(zip((good[i] for i in batch), scores, strict=True))
            # What cannot be read waits for the images before it, so that images of one size stay in order.
            behind = max(good[i] for i in batch) + 1
            while in_order and following in ready:
                yield ready.pop(following)
                following += 1
            if not in_order:
                yield from [ready.pop(i) for i in sorted(ready) if i < behind]
        yield from (ready[i] for i in sorted(ready))

    def _batches(self, pixels: Sequence[Tensor]) -> Iterator[list[int]]:
        """Indices of pictures that go through the model together: of like size, within the token budget."""
        if not pixels:
            return
        backend, config = self.backend, self.pixel_config
        thinking = self.mode == "think"
        visual = [config.visual_tokens(*p.shape[-2:]) for p in pixels]
        lengths = [backend.sequence_length(tokens, thinking) for tokens in visual]
        most_visual = math.inf if self.batch_tokens else getattr(backend, "batch_visual_tokens", math.inf)
        wanted = self.batch_tokens or getattr(backend, "batch_tokens", DEFAULT_BATCH_TOKENS)
        copies = 1 if self.mode == "score" else self.sampling.num_samples
        batch: list[int] = []
        held = 0  # tokens, without padding
        for index in sorted(range(len(pixels)), key=lambda i: (lengths[i], i)):
            # Sorted by length, so the newcomer is the longest and every row is padded to it. The budget is read anew
            # each time, because a batch that did not fit into memory lowers it.
            budget = 0 if self.deterministic else min(wanted, self._fitting_tokens or wanted)
            total = lengths[index] * (len(batch) + 1)
            wasteful = held * copies >= _ENOUGH * budget and total - held - lengths[index] > _PADDING * total
            crowded = visual[index] * (len(batch) + 1) > most_visual
            if batch and (total * copies > budget or crowded or wasteful):
                yield batch
                batch, held = [], 0
            batch.append(index)
            held += lengths[index]
        yield batch

    def _run(
        self, pixels: Sequence[Tensor], run: Callable[[list[int]], Outcome]
    ) -> Iterator[tuple[list[int], Outcome | ImageError]]:
        """Each batch of indices with what ``run`` made of it; an error for a picture too large for the memory."""
        at_a_time = getattr(self.backend, "images_at_a_time", 1) if pixels else 1
        if at_a_time > 1:
            yield from self._run_apart(len(pixels), run, at_a_time)
            return
        todo = self._batches(pixels)
        halves: list[list[int]] = []
        while batch := halves.pop() if halves else next(todo, None):
            try:
                yield batch, run(batch)
                continue
            except torch.OutOfMemoryError:
                pass  # go on outside, where the error no longer holds what the failed pass had allocated
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            height, width = pixels[batch[-1]].shape[-2:]
            tokens = self.backend.sequence_length(self.pixel_config.visual_tokens(height, width), self.mode == "think")
            if len(batch) == 1:
                yield (
                    batch,
                    ImageError(
                        f"{width}x{height} pixels do not fit into the free memory even alone; lower max_pixels, "
                        "load the weights with fewer bits (dtype, quantization), or free memory"
                    ),
                )
                continue
            if self._fitting_tokens is None:
                warnings.warn(
                    f"{len(batch)} pictures at once do not fit into the free memory: going on with smaller batches. "
                    "batch_tokens sets their size. This is said once.",
                    UserWarning,
                    stacklevel=4,
                )
            middle = len(batch) // 2
            self._fitting_tokens = tokens * middle * (1 if self.mode == "score" else self.sampling.num_samples)
            halves += [batch[middle:], batch[:middle]]

    def _run_apart(
        self, images: int, run: Callable[[list[int]], Outcome], at_a_time: int
    ) -> Iterator[tuple[list[int], Outcome | ImageError]]:
        """Each image alone, several at a time, as they are done: for a model that waits for answers from elsewhere."""
        graph = torch.is_grad_enabled()

        def run_one(index: int) -> Outcome:
            with torch.set_grad_enabled(graph):  # which each thread has for itself
                return run([index])

        pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="vqr1-scoring")
        futures = {pool.submit(run_one, index): index for index in range(images)}
        try:
            for future in as_completed(futures):
                try:
                    yield [futures[future]], future.result()
                except ImageFailed as error:
                    yield [futures[future]], ImageError(str(error))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in futures):  # an error of the whole, or Ctrl-C
                self.backend.cancel()
            pool.shutdown()

    def _backend_distributions(
        self, pixels: Sequence[Tensor], replies: Sequence[str] | None = None
    ) -> ScoreDistribution:
        return self.backend.distributions(pixels, self.pixel_config, replies=replies)

    def _score_batch(self, names: list[str], pixels: list[Tensor]) -> list[ImageScore]:
        with torch.no_grad():
            if self.mode == "score":
                distributions = self._backend_distributions(pixels).to("cpu")
                return [ImageScore.of(name, distributions[i]) for i, name in enumerate(names)]
            thinking = self.mode == "think" or self.thinking
            replies = self.backend.sample_replies(
                pixels, self.pixel_config, self.sampling, thinking=thinking, add_vision_id=self.add_vision_id
            )
            read = self._read_thoughts if self.mode == "think" else _read_samples
            return [read(name, image, texts) for name, image, texts in zip(names, pixels, replies, strict=True)]

    def _read_thoughts(self, name: str, image: Tensor, texts: list[str]) -> ImageScore:
        """The mixture of the distributions read out after each reasoning that came to an end."""
        ends = [_before_answer(text) for text in texts]
        finished = [end for end in ends if end is not None]
        replies = [ParsedReply(float("nan"), "the reasoning did not come to an end", text.strip()) for text in texts]
        if not finished:
            return ImageScore.failed(
                name, f"none of {len(texts)} sampled reasonings came to an end (</think>)", replies
            )
        distributions = self._backend_distributions([image] * len(finished), finished).to("cpu")
        means = iter(distributions.mean.tolist())
        for i, end in enumerate(ends):
            if end is not None:
                replies[i] = ParsedReply(next(means), None, parse_reply(texts[i]).reasoning)
        return ImageScore.of(name, distributions.mixture(), replies)

    def _warn_if_unreliable(self, results: Sequence[ImageScore]) -> None:
        low = [r for r in results if r.error is None and not r.reliable]
        if low and not self._warned:
            self._warned = True
            warnings.warn(
                f"{low[0].name}: only {low[0].coverage:.0%} of the model's answers would be a score and "
                f"{low[0].tag_probability:.0%} of its replies would open with the answer tag (below "
                f"{LOW_RELIABILITY:.0%}): was this model trained for the question? Every result carries both "
                "as coverage and tag_probability.",
                UserWarning,
                stacklevel=4,
            )


_DISTRIBUTION_FIELDS = ("probabilities", "coverage", "tag_probability")


def _before_answer(text: str) -> str | None:
    """A sampled reply up to its answer tag; with a reasoning that ended but no tag, up to where the tag belongs."""
    thought_end = text.rfind("</think>")
    if thought_end < 0:
        return None
    tag = text.rfind("<answer>")
    return text[:tag] if tag > thought_end else text[: thought_end + len("</think>")] + "\n"


def _read_samples(name: str, image: Tensor, texts: list[str]) -> ImageScore:
    """The empirical distribution of the scores that the sampled replies state."""
    replies = [parse_reply(text) for text in texts]
    scores = torch.tensor([reply.score for reply in replies], dtype=torch.float64)
    if not bool(torch.isfinite(scores).any()):
        return ImageScore.failed(
            name, f"none of {len(texts)} sampled replies held a score ({replies[0].reason})", replies
        )
    distribution = ScoreDistribution.from_samples(scores)
    tagged = torch.tensor(sum("<answer>" in text for text in texts) / len(texts), dtype=scores.dtype)
    return ImageScore.of(name, ScoreDistribution(distribution.probabilities, distribution.coverage, tagged), replies)
