"""`QualityScorer`: pictures in, score distributions out; comparing, ranking and explaining are made of those."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from vqr1_metric._warnings import warn_caller
from vqr1_metric.answering import (
    ask,
    check_mode,
    joined,
    prompts_of,
    questions_of,
    read,
    score_batch,
    warn_if_unreliable,
)
from vqr1_metric.backends.base import ModelError, Sampling, ScoringBackend, backend_identity
from vqr1_metric.backends.batches import Batches, TooLarge, run_apart
from vqr1_metric.backends.files import CONTENT
from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.backends.shared import SharedModel, forget, newest, shared
from vqr1_metric.backends.spec import EMBEDDED, ModelSpec
from vqr1_metric.functional.calibration import FILE as CALIBRATION_FILE
from vqr1_metric.functional.calibration import Calibration
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.images import (
    UNIT_RANGE,
    DataRange,
    FloatRange,
    ImageError,
    ImageLike,
    Images,
    check_images,
    describe,
    load_image,
    split_images,
)
from vqr1_metric.images.ahead import read_images
from vqr1_metric.images.find import ImageFinder
from vqr1_metric.protocol import PROMPT_VERSION, VISUALQUALITY_R1, Mode, Question, find_question
from vqr1_metric.results import Comparison, ImageScore, RankedImage, rank_results

if torch.distributed.is_available():
    # Before there is a process group, as a rule: transformers imports it with the model, and its default arguments hold
    # the group of that moment. Its threads would outlive it and now and then abort the process as the interpreter ends.
    import torch.distributed.nn.functional

DEFAULT_MODEL = "TianheWu/VisualQuality-R1-7B"
#: A long run holds at most so many decoded pictures and pixels at a time.
_WINDOW_PICTURES, _WINDOW_PIXELS = 64, 64_000_000

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
        question: what is asked: a name such as ``"levels"`` or ``"alignment"``, or a
            :class:`~vqr1_metric.protocol.Question`; see ``docs/questions.md``. Other questions than VisualQuality-R1's
            are for ``mode="score"``. A score is the expected value of the answers.
        add_vision_id: write "Picture 1: " before the picture, as the authors' scripts do and their training does not;
            None does so in ``sample`` mode only.
        data_range: what floating tensors and arrays hold: ``(low, high)`` of black and white, such as ``(-1, 1)``, or
            one number for ``(0, high)``. uint8 and files are not affected.
        clamp: take floats beyond ``data_range`` as black or white. Without, they raise
            :class:`~vqr1_metric.images.ImageContractError`: the output of a network overshoots, and so do bicubic
            resizes, but values of another range would be scored as noise.
        backend: a ready :class:`~vqr1_metric.backends.base.ScoringBackend`, instead of ``model``.
        calibration: what ``vqr1 calibrate`` fitted for this model, or its file: intervals then hold what they say of
            people's opinions. None takes the ``calibration.json`` of a model's folder, where there is one that was
            fitted for this mode; False takes none.

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
        question: str | Question = VISUALQUALITY_R1,
        data_range: DataRange = (0.0, 1.0),
        clamp: bool = False,
        backend: ScoringBackend | None = None,
        calibration: Calibration | str | Path | Literal[False] | None = None,
    ) -> None:
        self.question = find_question(question)
        check_mode(mode, self.question)
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"Expected batch_tokens of at least 1, but got {batch_tokens}.")
        self.spec = ModelSpec(
            model,
            revision,
            dtype=cast(str | None, dtype),  # of torch's own dtypes and devices a spec keeps the names
            device=cast(str | None, device),
            device_map=device_map,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
        self.mode: Mode = mode
        self.sampling = Sampling(num_samples, temperature, top_k, top_p, max_new_tokens, seed)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.batch_tokens = batch_tokens
        self.deterministic = deterministic
        self._batches = Batches()
        self.thinking = thinking
        self.add_vision_id = mode == "sample" if add_vision_id is None else add_vision_id
        self.floats = FloatRange.of(data_range, clamp)
        self._given_backend = backend
        self._given_calibration = Calibration.read(calibration) if isinstance(calibration, str | Path) else calibration
        self._shared: SharedModel | None = None  # the model as its files were when this scorer first used it
        self._warned = False

    # ---------------------------------------------------------------- scoring

    def score(
        self,
        images: Images,
        *,
        prompts: str | Sequence[str] | None = None,
        on_error: Literal["nan", "raise"] = "nan",
    ) -> list[ImageScore]:
        """Score pictures, in input order.

        Args:
            images: a tensor ``(B, C, H, W)`` or ``(C, H, W)`` (uint8, or floating in ``data_range``, any device), a
                path, a folder, bytes, an open file, a PIL picture, an array (RGB), or a list or iterator of these with
                any sizes; see :func:`~vqr1_metric.images.iterate_images`.
            prompts: what each image was made from, or one text for all, where the question asks about it.
            on_error: ``"nan"`` gives a bad picture the score NaN and its reason; ``"raise"`` raises
                :class:`~vqr1_metric.images.ImageError` at the first, before anything is scored.

        Raises:
            ImageContractError: for tensors and arrays of another form or range, or what is no picture at all, before
                anything is scored.
        """
        if on_error not in ("nan", "raise"):
            raise ValueError(f"Expected on_error 'nan' or 'raise', but got {on_error!r}.")
        split = self._checked(images)
        texts = prompts_of(self.question, prompts, len(split))
        if on_error == "nan":
            return list(self._stream(split, texts, self.floats))
        names = [describe(image, i) for i, image in enumerate(split)]
        loaded = [load_image(image, name, self.floats) for image, name in zip(split, names, strict=True)]
        results = self._stream(loaded, texts, UNIT_RANGE)
        return [replace(result, name=name) for result, name in zip(results, names, strict=True)]

    def stream(
        self,
        images: Images,
        *,
        prompts: str | Iterable[str] | None = None,
        in_order: bool = True,
    ) -> Iterator[ImageScore]:
        """Like :meth:`score`, one result after the other, in memory that does not grow with the number of pictures.

        Args:
            images, prompts: as for :meth:`score`. A list, tensor or array is checked as a whole before the first
                result, an iterator item by item.
            in_order: give the results in the order of the images. False gives those of a batch as soon as it has been
                through the model: within 64 images, those of like size come together.
        """
        at_hand = isinstance(images, (list, tuple, Tensor, np.ndarray))
        return self._stream(self._checked(images) if at_hand else images, prompts, self.floats, in_order)

    def _checked(self, images: Images) -> list[ImageLike]:
        split = split_images(images)
        check_images(split, self.floats, [describe(image, i) for i, image in enumerate(split)])
        return split

    def _stream(
        self, images: Images, prompts: str | Iterable[str] | None, floats: FloatRange, in_order: bool = True
    ) -> Iterator[ImageScore]:
        names: list[str] = []
        window: list[Tensor | ImageError] = []
        asked: list[Question] = []
        held = 0
        questions = questions_of(self.question, prompts)
        for name, pixels in read_images(images, floats):
            names.append(name)
            window.append(pixels)
            asked.append(next(questions))
            held += 0 if isinstance(pixels, ImageError) else pixels[0].numel()
            if len(window) >= _WINDOW_PICTURES or held >= _WINDOW_PIXELS:
                yield from self._score_window(names, window, asked, in_order)
                names, window, asked, held = [], [], [], 0
        yield from self._score_window(names, window, asked, in_order)

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
        self,
        images: Images,
        *,
        prompts: str | Sequence[str] | None = None,
        differentiable: bool = False,
    ) -> ScoreDistribution:
        """Distributions read out in one forward pass per batch (whatever ``mode`` says), leading shape ``(B,)``.

        Args:
            images, prompts: as for :meth:`score`; a bad image, or one too large for the memory, raises
                :class:`~vqr1_metric.images.ImageError`.
            differentiable: keep the autograd graph from the pixels of floating tensors to the distribution. The weights
                are frozen and get no gradient. Every batch's activations stay in memory until the backward pass.
        """
        split = self._checked(images)
        warn_if_detached(split, differentiable)
        pixels = [load_image(image, describe(image, i), self.floats) for i, image in enumerate(split)]
        if not pixels:
            raise ImageError("Expected at least one picture, but got none.")
        questions = list(
            islice(questions_of(self.question, prompts_of(self.question, prompts, len(pixels))), len(pixels))
        )

        def work(batch: list[int]) -> ScoreDistribution:
            chosen = [pixels[i] for i in batch]
            return read(self.backend, chosen, self.pixel_config, [questions[i] for i in batch])

        with torch.set_grad_enabled(differentiable):
            return joined(list(self._run(pixels, [self.question], work)))

    def ask(
        self,
        images: Images,
        questions: Sequence[str | Question],
        *,
        prompts: str | Sequence[str] | None = None,
    ) -> list[dict[str, ImageScore]]:
        """Several questions about each image, which is encoded once.

        Args:
            images, prompts: as for :meth:`score`; a bad image gets NaN and its reason for every question.
            questions: names or :class:`~vqr1_metric.protocol.Question` objects, with different names.

        Returns:
            For each image its answers by the names of the questions: ``score`` is the expected value,
            ``distribution`` holds the probability of every answer.
        """
        asked = [find_question(question) for question in questions]
        if len({question.name for question in asked}) < max(1, len(asked)) or any(q.images > 1 for q in asked):
            raise ValueError(f"Expected questions about one image, with different names, but got {questions}.")
        split = self._checked(images)
        texts = [prompts_of(question, prompts, len(split)) for question in asked]
        answers: list[dict[str, ImageScore]] = [{} for _ in split]
        names, good, pixels = [describe(image, i) for i, image in enumerate(split)], [], []
        for i, image in enumerate(split):
            try:
                pixels.append(load_image(image, names[i], self.floats))
                good.append(i)
            except ImageError as error:
                answers[i] = {question.name: ImageScore.failed(names[i], str(error)) for question in asked}

        def work(batch: list[int]) -> list[ScoreDistribution]:
            rows = [
                [q.about(text[good[i]]) for i in batch] if text else q for q, text in zip(asked, texts, strict=True)
            ]
            return ask(self.backend, [pixels[i] for i in batch], rows, self.pixel_config)

        with torch.no_grad():
            for batch, results in self._run(pixels, asked, work):
                for place, i in enumerate(good[i] for i in batch):
                    for which, question in enumerate(asked):
                        if isinstance(results, ImageError):
                            answer = ImageScore.failed(names[i], f"{names[i]}: {results}")
                        else:
                            answer = ImageScore.of(names[i], results[which][place].to("cpu"))
                        answers[i][question.name] = answer
        return answers

    def prefer(self, a: ImageLike, b: ImageLike, question: str | Question = "pairwise") -> ImageScore:
        """Which of two images is better, asked with both in one prompt, in both orders.

        Args:
            a, b: images as for :meth:`score`; a bad one raises :class:`~vqr1_metric.images.ImageError`.
            question: about two images, whose highest value means the first one, and whose answers mirror each other.

        Returns:
            ``score``: the mean of the value with ``a`` first and the mirrored one with ``b`` first; with
            ``"pairwise"`` the probability that ``a`` is better.
        """
        asked = find_question(question)
        mirrored = zip(asked.values, reversed(asked.values), strict=True)
        if asked.images != 2 or len({round(value + other, 9) for value, other in mirrored}) > 1:
            raise ValueError(f"Expected a question about two images with mirrored values, but got {asked.name!r}.")
        pair = self._checked([a, b])
        first, second = (load_image(image, describe(image, i), self.floats) for i, image in enumerate(pair))
        with torch.no_grad():
            both = self.backend.distributions([(first, second), (second, first)], self.pixel_config, question=asked)
        both = both.to("cpu")
        turned = replace(both, probabilities=torch.stack([both.probabilities[0], both.probabilities[1].flip(-1)]))
        return ImageScore.of(f"{describe(a, 0)} before {describe(b, 1)}", turned.mixture())

    def compare(self, a: ImageLike, b: ImageLike) -> Comparison:
        """Which of two pictures has the higher expected score, and how sure that is."""
        return Comparison.of(*self.score([a, b]))

    def rank(self, images: Images) -> list[RankedImage]:
        """Pictures ordered by expected score, best first; ties as :class:`~vqr1_metric.results.Comparison` has them."""
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
        return replace(scored, replies=thought.replies) if scored.error is None else scored

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
    def calibration(self) -> Calibration | None:
        """What widens the intervals, None where they are those of the model's distribution.

        Raises:
            ModelError: if the one that was given was fitted for another model, mode or question.
        """
        given = self._given_calibration
        if given is False:
            return None
        if given is None:
            folder = self.spec.folder if self._given_backend is None else None
            if folder is None or not (folder / CALIBRATION_FILE).is_file():
                return None
            found = Calibration.read(folder)
            asked = {"mode": self.mode, "question": self._question_identity()}
            return found if all(found.identity.get(key, value) == value for key, value in asked.items()) else None
        own = json.loads(json.dumps(self._own_identity()))
        for key in (*CONTENT, "mode", "question"):
            if key in given.identity and given.identity[key] != own.get(key):
                raise ModelError(
                    f"Expected a calibration that was fitted for this model, but its {key} is {given.identity[key]!r} "
                    f"instead of {own.get(key)!r}: fit another with vqr1 calibrate."
                )
        return given

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
        given; the question; what floating pixels mean; sampling only in a mode that samples; of a server its address,
        model and options. Where the model runs is no part of it, nor what only changes the speed.

        All values can be written as JSON. No weights are loaded, but those of a model on the Hub are downloaded. It
        stays the same as long as this scorer is not unloaded: one whose files were overwritten meanwhile refuses to
        load the new ones.

        Raises:
            ModelError: if the model cannot be found.
        """
        calibration = self.calibration
        return self._own_identity() | {"calibration": None if calibration is None else calibration.temperature}

    def _question_identity(self) -> object:
        return PROMPT_VERSION if self.question == VISUALQUALITY_R1 else self.question.identity()

    def _own_identity(self) -> dict[str, object]:
        given, limits = self._given_backend, self.pixel_config
        sampling = None
        if self.mode != "score":
            thinking = self.mode == "think" or self.thinking
            sampling = {**asdict(self.sampling), "thinking": thinking, "add_vision_id": self.add_vision_id}
        return {
            **(self._model().identity if given is None else backend_identity(given)),
            "min_pixels": limits.min_pixels,
            "max_pixels": limits.max_pixels,
            "question": self._question_identity(),
            "mode": self.mode,
            "data_range": list(self.floats.data_range),
            "clamp": self.floats.clamp,
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

    def replace(
        self, *, mode: Mode | None = None, data_range: DataRange | None = None, clamp: bool | None = None
    ) -> QualityScorer:
        """The same scorer in another mode or for other pixel values, sharing the weights; None keeps what there is."""
        mode = self.mode if mode is None else mode
        check_mode(mode, self.question)
        data_range = self.floats.data_range if data_range is None else data_range
        floats = FloatRange.of(data_range, self.floats.clamp if clamp is None else clamp)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, mode=mode, floats=floats)
        return other

    def __copy__(self) -> QualityScorer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> QualityScorer:
        return self

    def __repr__(self) -> str:
        name = self.spec.model if self._given_backend is None else self._given_backend.model_id
        return f"{type(self).__name__}({name!r}, mode={self.mode!r})"

    # ---------------------------------------------------------------- batches

    def _score_window(
        self, names: list[str], window: list[Tensor | ImageError], asked: list[Question], in_order: bool
    ) -> Iterator[ImageScore]:
        results = {i: ImageScore.failed(names[i], str(e)) for i, e in enumerate(window) if isinstance(e, ImageError)}
        good = [(i, pixels) for i, pixels in enumerate(window) if not isinstance(pixels, ImageError)]
        calibration = self.calibration if good else None

        def score(batch: list[int]) -> list[ImageScore]:
            indices = [good[i][0] for i in batch]
            return score_batch(
                self.backend,
                [names[i] for i in indices],
                [good[i][1] for i in batch],
                self.pixel_config,
                [asked[i] for i in indices],
                self.mode,
                self.sampling,
                thinking=self.thinking,
                add_vision_id=self.add_vision_id,
            )

        following = 0
        for batch, scores in self._run([pixels for _, pixels in good], [self.question], score):
            if isinstance(scores, ImageError):
                name = names[good[batch[0]][0]]
                scores = [ImageScore.failed(name, f"{name}: {scores}")]
            self._warned = self._warned or warn_if_unreliable(scores)
            if calibration is not None and all(asked[good[i][0]] == self.question for i in batch):
                scores = [replace(result, calibration=calibration) for result in scores]
            results.update(zip((good[i][0] for i in batch), scores, strict=True))
            # What cannot be read waits for the images before it, so that images of one size stay in order.
            behind = max(good[i][0] for i in batch) + 1
            while in_order and following in results:
                yield results.pop(following)
                following += 1
            if not in_order:
                yield from [results.pop(i) for i in sorted(results) if i < behind]
        yield from (results[i] for i in sorted(results))

    def _run(
        self, pixels: Sequence[Tensor], questions: Sequence[Question], work: Callable[[list[int]], Outcome]
    ) -> Iterator[tuple[list[int], Outcome | ImageError]]:
        """Each batch of indices with what ``work`` made of it; an error for a picture too large for the memory."""
        if not pixels:
            return
        backend, config = self.backend, self.pixel_config
        if (at_a_time := getattr(backend, "images_at_a_time", 1)) > 1:
            yield from run_apart(backend, len(pixels), work, at_a_time)
            return
        visual = [config.visual_tokens(*p.shape[-2:]) for p in pixels]
        # A backend may know of one question only, and others share what comes before them.
        asked = [{} if question is VISUALQUALITY_R1 else {"question": question} for question in questions]
        thinking = self.mode == "think"
        behind = sum(backend.sequence_length(0, thinking, **one) for one in asked[1:])
        lengths = [backend.sequence_length(tokens, thinking, **asked[0]) + behind for tokens in visual]
        copies = 1 if self.mode == "score" else self.sampling.num_samples
        for batch, outcome in self._batches.run(
            backend, lengths, visual, work, copies, self.batch_tokens, self.deterministic
        ):
            if not isinstance(outcome, TooLarge):
                yield batch, outcome
                continue
            height, width = pixels[batch[0]].shape[-2:]
            error = ImageError(
                f"{width}x{height} pixels do not fit into the free memory even alone; lower max_pixels, "
                "load the weights with fewer bits (dtype, quantization), or free memory"
            )
            yield batch, error


def warn_if_detached(images: Sequence[ImageLike], differentiable: bool) -> None:
    """Say once for a line that a score without gradients is computed of pixels that want them."""
    if differentiable or not torch.is_grad_enabled():
        return
    if any(isinstance(image, Tensor) and image.requires_grad for image in images):
        warn_caller(
            "These images require gradients, but the scores have none: pass differentiable=True to train through "
            "them, or images.detach() to only look. This is said once for this line.",
            once="detached",
        )
