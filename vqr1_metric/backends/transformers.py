"""The model in this process, through Hugging Face transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5-VL."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vqr1_metric.backends.base import Asked, Model, ModelError, Sampling
from vqr1_metric.backends.batches import MOST_TOKENS, fitting_tokens, tower_widths
from vqr1_metric.backends.cpu import fast_products
from vqr1_metric.backends.digests import digest_of, digest_of_tensors, preprocessor_digest
from vqr1_metric.backends.inputs import PromptWriter, continued, left_pad, pad_positions
from vqr1_metric.backends.loading import LoadedModel, load_model
from vqr1_metric.backends.passes import TreePasses
from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.backends.readout import (
    NEGLIGIBLE,
    AnswerTrie,
    build_answer_trie,
    read_distribution,
    spelling_shares,
)
from vqr1_metric.backends.sampling import sample_tokens
from vqr1_metric.backends.shared import cached
from vqr1_metric.backends.spec import ModelSpec
from vqr1_metric.backends.spellings import used_spellings
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import VISUALQUALITY_R1, Question

#: Tries of so many questions are kept.
_KEPT_TRIES = 64


class TransformersBackend:
    """A loaded model as a :class:`~vqr1_metric.backends.base.ScoringBackend`.

    Threads may share it, and the model: their calls wait for each other.

    Of the model it needs what the Qwen-VL classes of transformers have: ``model.model`` with ``visual``,
    ``language_model.layers``, ``get_rope_index`` and a forward that takes ``pixel_values``, ``image_grid_thw``,
    ``mm_token_type_ids``, positions ``(3, B, L)``, a cache, and a mask of four dimensions where all layers have full
    attention. Where some have not (Qwen3.5-VL), trees are read level by level from a cache instead.
    """

    def __init__(self, spec: ModelSpec, loaded: LoadedModel | None = None) -> None:
        self._spec = spec if loaded is None else None
        loaded = loaded or load_model(spec)
        self.model_id = spec.model
        self.revision = loaded.revision
        self._identity = loaded.identity
        self._values = None if loaded.identity is None else self._some_values(loaded.model)
        self.pixel_config = loaded.pixel_config
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self._chat_template = loaded.chat_template
        self._tries: dict[tuple[Question, bool], AnswerTrie] = {}
        self._lock = _lock_of(self.model)
        self._home = self.device
        # Quantised and spread-out models stay where they are: transformers refuses to move them.
        self._movable = not (spec.quantization or spec.device_map)
        config = self.model.config
        self._image_token = config.image_token_id
        self._prompts = PromptWriter(
            self.tokenizer, loaded.chat_template, self.model.model, self._image_token, self.model_id
        )
        self._never_sampled = [
            token
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            if (token := getattr(config, name, None)) is not None
        ]
        self._end_tokens = _as_list(self.model.generation_config.eos_token_id) or [self.tokenizer.eos_token_id]
        pad = self.tokenizer.pad_token_id
        self._pad_token = self._end_tokens[0] if pad is None else pad
        self._passes = TreePasses(self.model, self._pad_token, self._image_token)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self._spec is None:
            raise TypeError(
                "A backend made from weights in memory cannot be pickled: save them to a folder and name that."
            )
        return cached, (self._spec, TransformersBackend)  # the recipe, never the weights

    def __deepcopy__(self, memo: dict[int, object]) -> TransformersBackend:
        return self

    def identity(self) -> dict[str, object]:
        """All that decides what this model answers, but for the pixel limits; weights in memory by their values now."""
        loaded = self._unchanged_identity()
        if loaded is not None:
            return loaded
        return {
            "weights": digest_of_tensors(self.model.state_dict()),
            "tokenizer": digest_of(self.tokenizer.backend_tokenizer.to_str()),
            "chat_template": digest_of(self._chat_template),
            "preprocessor": preprocessor_digest(self.pixel_config),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config.get_text_config()._attn_implementation,
        }

    def _unchanged_identity(self) -> dict[str, object] | None:
        """What was loaded, as long as the weights are still those."""
        return self._identity if self._values == self._some_values(self.model) else None

    @staticmethod
    def _some_values(model: Model) -> str:
        return digest_of_tensors(model.state_dict(), 8)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return cast(torch.device, self.model.get_input_embeddings().weight.device)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass that suit the device and, on CUDA, the memory that is free now."""
        device = self.device
        if device.type != "cuda":
            return 2_048 if device.type == "cpu" else MOST_TOKENS
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held, but free to torch
        free = torch.cuda.mem_get_info(device)[0] + unused
        return fitting_tokens(free, self.model.config, self.model.dtype.itemsize)

    @property
    def batch_visual_tokens(self) -> int:
        """Visual tokens of one forward pass that suit the device.

        On a CPU so many that the vision tower's largest activation takes 4 MiB (with nano one picture of 512x512).
        Larger ones leave the caches, and their memory goes back to the system and is cleared again in every layer.
        """
        if self.device.type != "cpu":
            return MOST_TOKENS
        vision = self.model.config.vision_config
        row: int = vision.spatial_merge_size**2 * tower_widths(vision)[1] * self.model.dtype.itemsize
        return max(1, (4 << 20) // row)

    def offload(self) -> None:
        """Move the weights to the CPU until :meth:`to_own_device`."""
        with self._lock:
            if self._movable and self.device.type != "cpu":
                self.model.to("cpu")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def to_own_device(self) -> None:
        """Bring offloaded weights back."""
        with self._lock:
            if self._movable and self.device != self._home:
                self.model.to(self._home)

    @property
    def full_trie(self) -> AnswerTrie:
        """The trie of VisualQuality-R1's question with every spelling."""
        return self._trie(VISUALQUALITY_R1, every_spelling=True)

    @property
    def trie(self) -> AnswerTrie:
        """The trie of VisualQuality-R1's question without the spellings this model does not use."""
        return self._trie(VISUALQUALITY_R1)

    def use_trie(self, trie: AnswerTrie, question: Question = VISUALQUALITY_R1) -> None:
        """Read a question by this trie, whatever spellings the model uses."""
        self._tries[question, False] = trie

    @torch.inference_mode(False)  # it is kept, and a later call may need gradients
    def _trie(self, question: Question, every_spelling: bool = False) -> AnswerTrie:
        """The trie of a question's answers, without the spellings that this model does not use.

        Decided once, on a fixed picture, so that a score never depends on which pictures came first. What is dropped
        stays out of ``coverage``.
        """
        every_spelling |= len(question.spellings) == 1
        if every_spelling:  # then the tree depends on the answers alone
            question = replace(question, text="any", thinking_text=None, system=None)
        key = (question, every_spelling)
        with self._lock:
            found = self._tries.get(key)
            if found is None:
                found = (
                    build_answer_trie(self.tokenizer, None, question) if every_spelling else self._calibrated(question)
                )
                if len(self._tries) >= _KEPT_TRIES:
                    self._tries.clear()
                self._tries[key] = found
            return found

    def _calibrated(self, question: Question) -> AnswerTrie:
        full = self._trie(question, every_spelling=True)
        kept = used_spellings(self._unchanged_identity(), question, lambda: self._measured_spellings(question, full))
        return build_answer_trie(self.tokenizer, kept, question) if len(kept) < len(full.spellings) else full

    def _measured_spellings(self, question: Question, full: AnswerTrie) -> tuple[str, ...]:
        """The spellings that hold some of the tag's mass: one pass of the smallest image that the model takes."""
        picture = (_calibration_picture(self.pixel_config.min_pixels),) * question.images
        with torch.no_grad():
            hidden = self._tree_hidden([picture], self.pixel_config, full, None, [question])
            shares = spelling_shares(hidden, self.model.get_output_embeddings(), full).tolist()
        if not all(map(math.isfinite, shares)):
            raise ModelError(
                f"{self.model_id}: what the model computes for a plain picture is not finite. Its weights hold NaN or "
                f"infinity, or {self.model.dtype} is too narrow for it: try dtype='float32'."
            )
        return tuple(s for s, share in zip(full.spellings, shares, strict=True) if share >= NEGLIGIBLE * max(shares))

    def sequence_length(self, visual_tokens: int, thinking: bool, question: Question = VISUALQUALITY_R1) -> int:
        """Tokens one picture costs in :meth:`distributions`."""
        segments = self._prompts.segments(question, thinking)
        trie = self._trie(question, every_spelling=thinking)
        return sum(map(len, segments)) + visual_tokens + len(trie.prefix) + len(trie)

    def distributions(
        self,
        images: Sequence[Asked],
        pixel_config: PixelConfig,
        *,
        replies: Sequence[str] | None = None,
        question: Question | Sequence[Question] = VISUALQUALITY_R1,
    ) -> ScoreDistribution:
        """Distributions in one forward pass, leading shape ``(B,)``; differentiable if grad is enabled."""
        questions = [question] * len(images) if isinstance(question, Question) else list(question)
        with self._lock:
            trie = self._trie(questions[0], every_spelling=replies is not None)
            hidden = self._tree_hidden(images, pixel_config, trie, replies, questions)
            with torch.autocast(hidden.device.type, enabled=False):
                return read_distribution(hidden, self.model.get_output_embeddings(), trie)

    def ask(
        self, images: Sequence[Tensor], questions: Sequence[Question | Sequence[Question]], pixel_config: PixelConfig
    ) -> list[ScoreDistribution]:
        """Several questions about each picture, which goes through the model once up to where they differ.

        Args:
            images: B of them.
            questions: each one for all images, or B of them with the same answers.
            pixel_config: see :meth:`distributions`.

        Returns:
            For each question distributions of leading shape ``(B,)``.
        """
        rows = [[q] * len(images) if isinstance(q, Question) else list(q) for q in questions]
        with self._lock, torch.autocast(self.device.type, enabled=False), fast_products():
            tries = [self._trie(row[0]) for row in rows]
            begins = {tuple(self._prompts.segments(q, False)[0]) for row in rows for q in row}
            alike = len(begins) == 1 and self._passes.full_attention and all(row[0].images == 1 for row in rows)
            if not alike or len(rows) == 1:
                pairs = zip(rows, tries, strict=True)
                hidden = [self._tree_hidden(images, pixel_config, trie, None, row) for row, trie in pairs]
            else:
                hidden = self._shared_hidden(images, rows, pixel_config, tries)
            head = self.model.get_output_embeddings()
            return [read_distribution(one, head, trie) for one, trie in zip(hidden, tries, strict=True)]

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
        """K sampled replies for each picture; reply k depends on the picture, the seed and k alone."""
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False), fast_products():
            inputs = self._inputs(images, pixel_config, thinking, None, add_vision_id, question)
            seeds = [seed for image in images for seed in sampling.seeds(image)]
            tokens = sample_tokens(
                self.model, inputs, sampling, seeds, self._never_sampled, self._end_tokens, self._pad_token
            )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [texts[i : i + sampling.num_samples] for i in range(0, len(texts), sampling.num_samples)]

    # ---------------------------------------------------------------- forward passes

    def _tree_hidden(
        self,
        images: Sequence[Asked],
        pixel_config: PixelConfig,
        trie: AnswerTrie,
        replies: Sequence[str] | None,
        questions: Sequence[Question] | None = None,
    ) -> Tensor:
        """Final hidden states at the last prompt token and at every node, ``(B, 1 + nodes, D)``."""
        questions = questions or [VISUALQUALITY_R1] * len(images)
        thinking = replies is not None
        said = [self.tokenizer.encode(reply, add_special_tokens=False) for reply in replies or [""] * len(images)]
        with torch.autocast(self.device.type, enabled=False), fast_products():
            same = len(images) > 1 and all(image is images[0] for image in images)
            if same and self._passes.full_attention and all(said) and all(q == questions[0] for q in questions):
                prompt = self._padded(*self._rows(images[:1], questions[:1], pixel_config, thinking))
                suffixes = [[*reply, *trie.prefix] for reply in said]
                return self._passes.after_prompts(prompt, [suffixes], [trie] * len(said))[0]
            rows, positions, pixels = self._rows(images, questions, pixel_config, thinking)
            said = [[*reply, *trie.prefix] for reply in said]
            rows = [[*row, *reply] for row, reply in zip(rows, said, strict=True)]
            positions = [continued(p, len(reply)) for p, reply in zip(positions, said, strict=True)]
            padded = len({*map(len, rows)}) > 1
            return self._passes.read(self._padded(rows, positions, pixels), trie, padded=padded)

    def _shared_hidden(
        self,
        images: Sequence[Tensor],
        questions: Sequence[Sequence[Question]],
        pixel_config: PixelConfig,
        tries: Sequence[AnswerTrie],
    ) -> list[Tensor]:
        """As :meth:`_tree_hidden` for each question, the images encoded once with what all prompts begin with."""
        after = [
            [
                [*self._prompts.segments(row[i], False)[1], *trie.prefix]
                for row, trie in zip(questions, tries, strict=True)
            ]
            for i in range(len(images))
        ]
        texts = [text for of_image in after for text in of_image]
        common = min(len(text) for text in texts) - 1
        while any(text[:common] != texts[0][:common] for text in texts):
            common -= 1
        rows, positions, pixels = self._rows(images, questions[0], pixel_config, thinking=False)
        unread = [
            len(row) - len(self._prompts.segments(q, False)[1]) for row, q in zip(rows, questions[0], strict=True)
        ]
        begun = [row[: length + common] for row, length in zip(rows, unread, strict=True)]
        begun_positions = [p[:, : len(row)] for p, row in zip(positions, begun, strict=True)]
        inputs = self._padded(begun, begun_positions, pixels)
        suffixes = [[text[common:] for text in of_image] for of_image in after]
        hidden = self._passes.after_prompts(inputs, suffixes, list(tries))
        return [hidden[:, q, : len(trie) + 1] for q, trie in enumerate(tries)]

    def _rows(
        self,
        images: Sequence[Asked],
        questions: Sequence[Question],
        pixel_config: PixelConfig,
        thinking: bool,
        add_vision_id: bool = False,
    ) -> tuple[list[list[int]], list[Tensor], dict[str, Tensor]]:
        """Token ids and positions of each prompt, and the pixels of all."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        rows, positions, patches, sizes = [], [], [], []
        for image, question in zip(images, questions, strict=True):
            parts = [to_patches(one.to(self.device), pixel_config, dtype) for one in _as_tuple(image)]
            grids = [grid for _, grid in parts]
            segments = self._prompts.segments(question, thinking, add_vision_id)
            rows.append(self._prompts.row(segments, grids, pixel_config.merge_size))
            positions.append(self._prompts.positions(segments, grids, rows[-1]))
            patches += [part for part, _ in parts]
            sizes += grids
        pixels = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(sizes).to(self.device)}
        return rows, positions, pixels

    def _inputs(
        self,
        images: Sequence[Asked],
        pixel_config: PixelConfig,
        thinking: bool,
        replies: Sequence[str] | None,
        add_vision_id: bool,
        question: Question = VISUALQUALITY_R1,
    ) -> dict[str, Tensor]:
        """Left-padded model inputs for prompts, and what was replied so far."""
        rows, positions, pixels = self._rows(images, [question] * len(images), pixel_config, thinking, add_vision_id)
        said = [self.tokenizer.encode(reply, add_special_tokens=False) for reply in replies or [""] * len(images)]
        rows = [[*row, *reply] for row, reply in zip(rows, said, strict=True)]
        return self._padded(rows, [continued(p, len(r)) for p, r in zip(positions, said, strict=True)], pixels)

    def _padded(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Tensor], pixels: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inputs = left_pad(rows, self._pad_token, self._image_token) | {"position_ids": pad_positions(positions)}
        return {name: value.to(self.device) for name, value in inputs.items()} | pixels


_locks: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_of_locks = threading.Lock()


def _lock_of(model: torch.nn.Module) -> threading.RLock:
    """The one lock of a model, whoever holds it: moving it, offloading hooks and quantised layers bear one call at a
    time.
    """
    with _of_locks:
        return _locks.setdefault(model, threading.RLock())


def _as_tuple(image: Asked) -> tuple[Tensor, ...]:
    return (image,) if isinstance(image, Tensor) else tuple(image)


def _calibration_picture(pixels: int) -> Tensor:
    """A fixed picture of so many pixels with smooth and fine structure, ``(3, side, side)``."""
    ramp = torch.linspace(0, 1, math.isqrt(max(pixels, 1) - 1) + 1)
    waves = torch.sin(torch.outer(ramp * 40, ramp * 30))
    return torch.stack([ramp.expand_as(waves), 0.5 + 0.4 * waves, ramp.expand_as(waves).T])


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
