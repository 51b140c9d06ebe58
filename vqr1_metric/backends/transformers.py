"""The model in this process, through Hugging Face transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from vqr1_metric.backends.base import ModelError, Sampling
from vqr1_metric.backends.loading import LoadedModel, ModelSpec, cached, load_model
from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.backends.readout import (
    NEGLIGIBLE,
    SPELLINGS,
    AnswerTrie,
    build_answer_trie,
    read_distribution,
    spelling_shares,
    tree_attention,
)
from vqr1_metric.functional.distribution import ScoreDistribution
from vqr1_metric.prompts import messages


class TransformersBackend:
    """A loaded model as a :class:`~vqr1_metric.backends.base.ScoringBackend`. Not thread-safe."""

    def __init__(self, spec: ModelSpec, loaded: LoadedModel | None = None) -> None:
        self._spec = spec if loaded is None else None
        loaded = loaded or load_model(spec)
        self.model_id = spec.model
        self.revision = loaded.revision
        self.pixel_config = loaded.pixel_config
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self._chat_template = loaded.chat_template
        self._prompts: dict[tuple[bool, bool], tuple[list[int], list[int]]] = {}
        self._home = self.device
        # Quantised and spread-out models stay where they are: transformers refuses to move them.
        self._movable = not (spec.quantization or spec.device_map)
        config = self.model.config
        self._image_token = config.image_token_id
        self._never_sampled = [
            token for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            if (token := getattr(config, name, None)) is not None
        ]  # fmt: skip
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

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass that suit the device."""
        return 4_096 if self.device.type == "cpu" else 16_384

    def offload(self) -> None:
        """Move the weights to the CPU until :meth:`to_own_device`."""
        if self._movable and self.device.type != "cpu":
            self.model.to("cpu")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def to_own_device(self) -> None:
        """Bring offloaded weights back."""
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
        with torch.no_grad():
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
        from transformers import GenerationConfig, LogitsProcessorList

        repeated = [image for image in images for _ in range(sampling.num_samples)]
        inputs = self._inputs(repeated, pixel_config, thinking, None, add_vision_id)
        sampler = SeededSampler(sampling, len(images), self._never_sampled)
        # Replace the checkpoint's own generation settings: where ours equal the library's defaults, transformers would
        # otherwise fill in those of the checkpoint (Qwen: temperature near 0, repetition penalty 1.05).
        previous, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                output = self.model.generate(
                    **inputs,
                    generation_config=GenerationConfig(
                        do_sample=False, max_new_tokens=sampling.max_new_tokens,
                        eos_token_id=self._end_tokens, pad_token_id=self._pad_token,
                    ),
                    logits_processor=LogitsProcessorList([sampler]),
                )  # fmt: skip
        finally:
            self.model.generation_config = previous
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [texts[i : i + sampling.num_samples] for i in range(0, len(texts), sampling.num_samples)]

    def _tree_hidden(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, trie: AnswerTrie, replies: Sequence[str] | None
    ) -> Tensor:
        """Final hidden states at the last prompt token and at every node, ``(B, 1 + nodes, D)``."""
        with torch.autocast(self.device.type, enabled=False):
            inputs = self._inputs(images, pixel_config, replies is not None, replies, add_vision_id=False)
            prompt_mask = inputs.pop("attention_mask")
            positions, _ = self.model.model.get_rope_index(attention_mask=prompt_mask, **_rope_inputs(inputs))
            device, batch = positions.device, len(images)
            node_positions = positions[:, :, -1:] + trie.depths.to(device)
            nodes = trie.tokens.to(device).expand(batch, -1)
            mask = tree_attention(prompt_mask, trie)
            if self.model.config.get_text_config()._attn_implementation == "eager":
                # Eager attention adds its mask to the logits; a boolean one would be added as 0 and 1.
                dtype = self.model.get_input_embeddings().weight.dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            output = self.model.model(
                input_ids=torch.cat([inputs["input_ids"], nodes], dim=1),
                attention_mask=mask,
                position_ids=torch.cat([positions, node_positions], dim=2),
                mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(nodes)], dim=1),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                use_cache=False,
            )
            return output.last_hidden_state[:, -(len(trie) + 1) :]

    def _inputs(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, thinking: bool, replies: Sequence[str] | None,
        add_vision_id: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Left-padded model inputs for a batch."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        patches, grids = zip(*(to_patches(image.to(self.device), pixel_config, dtype) for image in images), strict=True)
        before, after = self._prompt(thinking, add_vision_id)
        rows = []
        for i, (_, height, width) in enumerate(grids):
            visual = height * width // pixel_config.merge_size**2
            said = self.tokenizer.encode(replies[i], add_special_tokens=False) if replies is not None else []
            rows.append([*before, *[self._image_token] * visual, *after, *said])
        length = max(map(len, rows))
        ids = torch.tensor([[self._pad_token] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        visual = torch.tensor([[0] * (length - len(row)) + [int(t == self._image_token) for t in row] for row in rows])
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            # Without it the model silently numbers the visual tokens as if they were text.
            "mm_token_type_ids": visual.int().to(self.device),
            "pixel_values": torch.cat(patches),
            "image_grid_thw": torch.tensor(grids, device=self.device),
        }

    def _prompt(self, thinking: bool, add_vision_id: bool) -> tuple[list[int], list[int]]:
        """Token ids before and after the visual tokens."""
        key = (thinking, add_vision_id)
        if key not in self._prompts:
            self._prompts[key] = self._tokenise_prompt(thinking, add_vision_id)
        return self._prompts[key]

    def _tokenise_prompt(self, thinking: bool, add_vision_id: bool) -> tuple[list[int], list[int]]:
        text = self.tokenizer.apply_chat_template(
            messages(thinking), chat_template=self._chat_template, add_generation_prompt=True, tokenize=False,
            add_vision_id=add_vision_id,
        )  # fmt: skip
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if ids.count(self._image_token) != 1:
            raise ModelError(
                f"{self.model_id}: expected a chat template that writes one image placeholder, but got "
                f"{ids.count(self._image_token)} of them."
            )
        at = ids.index(self._image_token)
        return ids[:at], ids[at + 1 :]


class SeededSampler:
    """A logits processor that turns greedy decoding into sampling with one generator per reply.

    The arg max of logits plus Gumbel noise is a sample of their softmax, so a reply depends on its own generator and
    not, as with a shared one, on which other pictures are in the batch.
    """

    def __init__(self, sampling: Sampling, images: int, never_sampled: Sequence[int]) -> None:
        self.sampling = sampling
        self.never_sampled = list(never_sampled)
        self.generators = [
            torch.Generator().manual_seed(sampling.seed * 1_000_003 + k)
            for _ in range(images)
            for k in range(sampling.num_samples)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.double() / self.sampling.temperature
        logits[:, self.never_sampled] = -torch.inf
        if self.sampling.top_k:
            smallest = logits.topk(min(self.sampling.top_k, logits.shape[1]), dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.sampling.top_p < 1:
            ordered, index = logits.sort(dim=1, descending=True)
            mass_before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
            outside = (mass_before >= self.sampling.top_p).scatter(1, index, mass_before >= self.sampling.top_p)
            logits = logits.masked_fill(outside, -torch.inf)
        uniform = torch.stack([torch.rand(logits.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -(-uniform.clamp(min=1e-300).log()).log()
        return logits + gumbel.to(logits.device)


def _calibration_picture() -> Tensor:
    """A fixed picture with smooth and fine structure, ``(3, 224, 224)``."""
    ramp = torch.linspace(0, 1, 224)
    waves = torch.sin(torch.outer(ramp * 40, ramp * 30))
    return torch.stack([ramp.expand(224, 224), 0.5 + 0.4 * waves, ramp.expand(224, 224).T])


def _rope_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
