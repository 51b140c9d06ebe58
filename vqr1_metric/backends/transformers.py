"""The model in this process, through Hugging Face transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from vqr1_metric.backends import packing
from vqr1_metric.backends.base import ModelError, Sampling
from vqr1_metric.backends.cpu import fast_products
from vqr1_metric.backends.files import digest_of, digest_of_tensors, preprocessor_digest
from vqr1_metric.backends.loading import LoadedModel, ModelSpec, cached, load_model
from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.backends.readout import (
    NEGLIGIBLE,
    SPELLINGS,
    AnswerTrie,
    build_answer_trie,
    read_distribution,
    read_rows_of,
    spelling_shares,
    tree_attention,
)
from vqr1_metric.backends.sampling import sample_tokens, with_cache
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.protocol import messages

#: More tokens at once fill no GPU better.
_MOST_TOKENS = 16_384
#: Positions of prompts with pictures of so many different sizes are kept.
_KEPT_POSITIONS = 256


class TransformersBackend:
    """A loaded model as a :class:`~vqr1_metric.backends.base.ScoringBackend`.

    Threads may share it, and the model: their calls wait for each other.
    """

    def __init__(self, spec: ModelSpec, loaded: LoadedModel | None = None) -> None:
        self._spec = spec if loaded is None else None
        loaded = loaded or load_model(spec)
        self.model_id = spec.model
        self.revision = loaded.revision
        self._identity = loaded.identity
        self.pixel_config = loaded.pixel_config
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self._chat_template = loaded.chat_template
        self._prompts: dict[tuple[bool, bool], tuple[list[int], list[int]]] = {}
        self._positions: dict[tuple, Tensor] = {}
        self._lock = _lock_of(self.model)
        self._home = self.device
        # Quantised and spread-out models stay where they are: transformers refuses to move them.
        self._movable = not (spec.quantization or spec.device_map)
        config = self.model.config
        self._cuts_rows = read_rows_of(self.model.model.language_model.layers[-1])
        self._image_token = config.image_token_id
        self._never_sampled = [
            token
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            if (token := getattr(config, name, None)) is not None
        ]
        self._end_tokens = _as_list(self.model.generation_config.eos_token_id) or [self.tokenizer.eos_token_id]
        pad = self.tokenizer.pad_token_id
        self._pad_token = self._end_tokens[0] if pad is None else pad

    def __reduce__(self):
        if self._spec is None:
            raise TypeError(
                "A backend made from weights in memory cannot be pickled: save them to a folder and name that."
            )
        return cached, (self._spec, TransformersBackend)  # the recipe, never the weights

    def __deepcopy__(self, memo: dict) -> TransformersBackend:
        return self

    def identity(self) -> dict[str, object]:
        """All that decides what this model answers, but for the pixel limits; weights in memory by their values now."""
        if self._identity is not None:
            return self._identity
        return {
            "weights": digest_of_tensors(self.model.state_dict()),
            "tokenizer": digest_of(self.tokenizer.backend_tokenizer.to_str()),
            "chat_template": digest_of(self._chat_template),
            "preprocessor": preprocessor_digest(self.pixel_config),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config.get_text_config()._attn_implementation,
        }

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass that suit the device and, on CUDA, the memory that is free now."""
        device = self.device
        if device.type != "cuda":
            return 2_048 if device.type == "cpu" else _MOST_TOKENS
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
            return _MOST_TOKENS
        vision = self.model.config.vision_config
        row = vision.spatial_merge_size**2 * _tower_widths(vision)[1] * self.model.dtype.itemsize
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

    @cached_property
    @torch.inference_mode(False)  # it is kept, and a later call may need gradients
    def full_trie(self) -> AnswerTrie:
        """The trie with every spelling."""
        return build_answer_trie(self.tokenizer)

    @cached_property
    @torch.inference_mode(False)
    def trie(self) -> AnswerTrie:
        """The trie without the spellings this model does not use.

        Decided once, on a fixed picture, so that a score never depends on which pictures came first. What is dropped
        stays out of ``coverage``.
        """
        with self._lock, torch.no_grad():
            hidden = self._tree_hidden([_calibration_picture()], self.pixel_config, self.full_trie, None)
            shares = spelling_shares(hidden, self.model.get_output_embeddings(), self.full_trie).tolist()
        largest = max(shares)
        kept = tuple(s for s, share in zip(SPELLINGS, shares, strict=True) if share >= NEGLIGIBLE * largest)
        return build_answer_trie(self.tokenizer, kept) if len(kept) < len(SPELLINGS) else self.full_trie

    def sequence_length(self, visual_tokens: int, thinking: bool) -> int:
        """Tokens one picture costs in :meth:`distributions`."""
        before, after = self._prompt(thinking, False)
        return len(before) + visual_tokens + len(after) + len(self.full_trie if thinking else self.trie)

    def distributions(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, *, replies: Sequence[str] | None = None
    ) -> ScoreDistribution:
        """Score distributions in one forward pass, leading shape ``(B,)``; differentiable if grad is enabled."""
        with self._lock:
            trie = self.trie if replies is None else self.full_trie
            hidden = self._tree_hidden(images, pixel_config, trie, replies)
            with torch.autocast(hidden.device.type, enabled=False):
                return read_distribution(hidden, self.model.get_output_embeddings(), trie)

    def sample_replies(
        self,
        images: Sequence[Tensor],
        pixel_config: PixelConfig,
        sampling: Sampling,
        *,
        thinking: bool,
        add_vision_id: bool,
    ) -> list[list[str]]:
        """K sampled replies for each picture; reply k depends on the picture, the seed and k alone."""
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False), fast_products():
            inputs = self._inputs(images, pixel_config, thinking, None, add_vision_id)
            seeds = [seed for image in images for seed in sampling.seeds(image)]
            tokens = sample_tokens(
                self.model, inputs, sampling, seeds, self._never_sampled, self._end_tokens, self._pad_token
            )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [texts[i : i + sampling.num_samples] for i in range(0, len(texts), sampling.num_samples)]

    def _tree_hidden(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, trie: AnswerTrie, replies: Sequence[str] | None
    ) -> Tensor:
        """Final hidden states at the last prompt token and at every node, ``(B, 1 + nodes, D)``."""
        with torch.autocast(self.device.type, enabled=False), fast_products():
            if replies is not None and len(images) > 1 and all(image is images[0] for image in images):
                said = [self.tokenizer.encode(reply, add_special_tokens=False) for reply in replies]
                if all(said):
                    return self._after_one_prompt(images[0], pixel_config, trie, said)
            inputs = self._inputs(images, pixel_config, replies is not None, replies, add_vision_id=False)
            if self.model.config.get_text_config()._attn_implementation == packing.ATTENTION:
                return self._packed_tree_hidden(inputs, trie)
            prompt_mask, positions = inputs.pop("attention_mask"), inputs.pop("position_ids")
            device, batch = positions.device, len(images)
            node_positions = positions[:, :, -1:] + trie.depths.to(device)
            nodes = trie.tokens.to(device).expand(batch, -1)
            lengths = {pixel_config.visual_tokens(*image.shape[-2:]) for image in images}
            same = replies is None and len(lengths) == 1  # no padding: one mask serves all
            mask = self._as_attention_takes_it(tree_attention(prompt_mask[:1] if same else prompt_mask, trie))
            mask = mask.expand(batch, -1, -1, -1)
            output = self.model.model(
                input_ids=torch.cat([inputs["input_ids"], nodes], dim=1),
                attention_mask=mask,
                position_ids=torch.cat([positions, node_positions], dim=2),
                mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(nodes)], dim=1),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                use_cache=False,
                **self._reading(len(trie) + 1),
            )
            return output.last_hidden_state[:, -(len(trie) + 1) :]

    def _packed_tree_hidden(self, inputs: dict[str, Tensor], trie: AnswerTrie) -> Tensor:
        """As :meth:`_tree_hidden`, without padding."""
        read = len(inputs["input_ids"]), len(trie) + 1
        packed = inputs | packing.pack(inputs, trie)
        output = self.model.model(**packed, use_cache=False, **self._reading(math.prod(read)))
        return output.last_hidden_state[0, -math.prod(read) :].unflatten(0, read)

    def _after_one_prompt(
        self, image: Tensor, pixel_config: PixelConfig, trie: AnswerTrie, replies: Sequence[Sequence[int]]
    ) -> Tensor:
        """As :meth:`_tree_hidden`, for several replies (tokens) about one picture, which goes through once."""
        prompt = self._inputs([image], pixel_config, thinking=True, replies=None, add_vision_id=False)
        memory = DynamicCache(config=self.model.config.get_text_config())
        self.model.model(**prompt, **with_cache(self.model.model, memory))
        memory.reorder_cache(torch.zeros(len(replies), dtype=torch.long, device=prompt["input_ids"].device))
        device, longest = prompt["input_ids"].device, max(map(len, replies))
        lengths = torch.tensor([len(reply) for reply in replies])[:, None]
        steps = torch.arange(longest) - (longest - lengths)  # negative where a shorter reply is padded
        said = torch.tensor([[self._pad_token] * (longest - len(reply)) + list(reply) for reply in replies])
        last = prompt["position_ids"][:, :, -1:]
        positions = last + 1 + torch.cat([steps.clamp(min=0), lengths - 1 + trie.depths], dim=1).to(device)
        seen = torch.cat([torch.ones(len(replies), prompt["input_ids"].shape[1]), steps >= 0], dim=1).to(device)
        mask = tree_attention(seen, trie)[:, :, prompt["input_ids"].shape[1] :]
        output = self.model.model(
            input_ids=torch.cat([said, trie.tokens.expand(len(replies), -1)], dim=1).to(device),
            attention_mask=self._as_attention_takes_it(mask),
            position_ids=positions,
            **with_cache(self.model.model, memory),
            **self._reading(len(trie) + 1),
        )
        return output.last_hidden_state[:, -(len(trie) + 1) :]

    def _reading(self, rows: int) -> dict[str, int]:
        """What tells the last layer how many of the last rows are read."""
        return {"read_rows": rows} if self._cuts_rows else {}

    def _as_attention_takes_it(self, mask: Tensor) -> Tensor:
        """Eager attention adds its mask to the logits; a boolean one would be added as 0 and 1."""
        if self.model.config.get_text_config()._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _inputs(
        self,
        images: Sequence[Tensor],
        pixel_config: PixelConfig,
        thinking: bool,
        replies: Sequence[str] | None,
        add_vision_id: bool,
    ) -> dict[str, Tensor]:
        """Left-padded model inputs for a batch."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        patches, grids = zip(*(to_patches(image.to(self.device), pixel_config, dtype) for image in images), strict=True)
        rows, positions = [], []
        for i, grid in enumerate(grids):
            before, after = self._prompt(thinking, add_vision_id)
            said = self.tokenizer.encode(replies[i], add_special_tokens=False) if replies is not None else []
            visual = [self._image_token] * (grid[1] * grid[2] // pixel_config.merge_size**2)
            rows.append([*before, *visual, *after, *said])
            prompt = self._prompt_positions(grid, rows[-1][: len(rows[-1]) - len(said)])
            positions.append(torch.cat([prompt, prompt[:, -1:] + torch.arange(1, len(said) + 1)], dim=1))
        length = max(map(len, rows))
        ids = torch.tensor([[self._pad_token] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            # Without it the model silently numbers the visual tokens as if they were text.
            "mm_token_type_ids": ((ids == self._image_token) & mask.bool()).int(),
            "position_ids": torch.stack([pad(p, (length - p.shape[1], 0)) for p in positions], dim=1),
            "image_grid_thw": torch.tensor(grids),
        }
        return {name: value.to(self.device) for name, value in inputs.items()} | {"pixel_values": torch.cat(patches)}

    def _prompt_positions(self, grid: tuple[int, int, int], ids: list[int]) -> Tensor:
        """Positions of a prompt in time, height and width, ``(3, P)``, on the CPU; kept, as sizes come again."""
        key = (grid, len(ids), ids.index(self._image_token))
        found = self._positions.get(key)
        if found is None:
            if len(self._positions) >= _KEPT_POSITIONS:
                self._positions.clear()
            tokens = torch.tensor([ids])
            of_batch, _ = self.model.model.get_rope_index(
                input_ids=tokens,
                mm_token_type_ids=(tokens == self._image_token).int(),
                image_grid_thw=torch.tensor([grid]),
                attention_mask=torch.ones_like(tokens),
            )
            found = self._positions[key] = of_batch[:, 0]
        return found

    def _prompt(self, thinking: bool, add_vision_id: bool) -> tuple[list[int], list[int]]:
        """Token ids before and after the visual tokens."""
        key = (thinking, add_vision_id)
        if key not in self._prompts:
            self._prompts[key] = self._tokenise_prompt(thinking, add_vision_id)
        return self._prompts[key]

    def _tokenise_prompt(self, thinking: bool, add_vision_id: bool) -> tuple[list[int], list[int]]:
        text = self.tokenizer.apply_chat_template(
            messages(thinking),
            chat_template=self._chat_template,
            add_generation_prompt=True,
            tokenize=False,
            add_vision_id=add_vision_id,
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if ids.count(self._image_token) != 1:
            raise ModelError(
                f"{self.model_id}: expected a chat template that writes one image placeholder, but got "
                f"{ids.count(self._image_token)} of them."
            )
        at = ids.index(self._image_token)
        return ids[:at], ids[at + 1 :]


_locks: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_of_locks = threading.Lock()


def _lock_of(model: torch.nn.Module) -> threading.RLock:
    """The one lock of a model, whoever holds it: moving it, offloading hooks and quantised layers bear one call at a
    time.
    """
    with _of_locks:
        return _locks.setdefault(model, threading.RLock())


def fitting_tokens(free_bytes: int, config, item_bytes: int) -> int:
    """Tokens of one forward pass whose activations fit into half of the free memory, at least 1.

    The largest moment is a layer's: in the tower each visual token is ``merge**2`` patches; beside the hidden states
    (about 8 tensors of the layer's width with its queries, keys and values) there are 3 of the inner width.
    """
    text, vision = config.get_text_config(), config.vision_config
    width, inner = _tower_widths(vision)
    of_tower = vision.spatial_merge_size**2 * (8 * width + 3 * inner)
    of_language_model = 8 * text.hidden_size + 3 * text.intermediate_size
    return max(1, min(_MOST_TOKENS, int(free_bytes / 2 / (item_bytes * max(of_tower, of_language_model)))))


def _tower_widths(vision) -> tuple[int, int]:
    """Width of a vision tower and of its MLPs; Qwen2-VL names them in its own way."""
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return width, getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)


def _calibration_picture() -> Tensor:
    """A fixed picture with smooth and fine structure, ``(3, 224, 224)``."""
    ramp = torch.linspace(0, 1, 224)
    waves = torch.sin(torch.outer(ramp * 40, ramp * 30))
    return torch.stack([ramp.expand(224, 224), 0.5 + 0.4 * waves, ramp.expand(224, 224).T])


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
