"""The embedded model: a small convolutional tower in place of Qwen2.5-VL's, before a language model of that kind.

The tower takes what a Qwen2.5-VL tower takes (flattened patches, and rows and columns of each picture) and gives what
that gives: visual tokens, one for each 32x32 pixels. Everything after it is Qwen2.5-VL's own code. Importing this
module makes the model known to transformers, so that ``AutoModelForImageTextToText.from_pretrained`` loads it.

The blocks are those of EfficientNet-Lite (Tan and Le, 2019, arXiv 1905.11946, and the Lite variant of their
repository): inverted residuals with ReLU6. Batch norms are folded into the convolutions, so that the tower has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, hardtanh, hardtanh_, pad, silu
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)

from vqr1_metric.nano.configuration import TOKEN_SIDE, NanoConfig, NanoVisionConfig

_FILTER_SIDE = 5
_FAINTEST = 1 / 128
"""One grey level, with pixels in [-1, 1]: weaker answers of a filter are as good as none."""


class Convolution(nn.Conv2d):
    """A convolution with bias and, where asked for, ReLU6 after it: one call where torch has it fused."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, depthwise: bool = False, clipped: bool = True
    ) -> None:
        groups = inputs if depthwise else 1
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.clipped = clipped

    def forward(self, x: Tensor) -> Tensor:
        if _can_fuse(x, self.weight):
            kind, limits = ("hardtanh", [0.0, 6.0]) if self.clipped else ("none", [])
            fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, kind, limits, ""
            )
            return fused
        x = conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if not self.clipped:
            return x
        return hardtanh(x, 0.0, 6.0) if x.requires_grad else hardtanh_(x, 0.0, 6.0)


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    """oneDNN's convolution with the clipping inside: twice as fast in bfloat16. It knows no gradients."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, reduce; what comes in is added where shapes allow."""

    def __init__(self, inputs: int, inside: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        self.widen = Convolution(inputs, inside, 1) if inside != inputs else nn.Identity()
        self.spread = Convolution(inside, inside, kernel, stride, depthwise=True)
        self.reduce = Convolution(inside, outputs, 1, clipped=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reduce(self.spread(self.widen(x)))
        return x + y if self.adds else y


class NanoTower(PreTrainedModel):
    """Pictures to visual tokens: local statistics of the blocks and of some fixed filters, then two linear layers."""

    config_class = NanoVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedResidual"]  # noqa: RUF012  as transformers declares it
    # It has no attention; whatever the language model is given suits it.
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: NanoVisionConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.filters = nn.Parameter(torch.zeros(config.filters, 3, _FILTER_SIDE, _FILTER_SIDE), requires_grad=False)
        self.stem = Convolution(3, config.stem, 3, 2)
        self.blocks = nn.ModuleList()
        width, stride, self._strides = config.stem, 2, []
        for inside, kernel, step, outputs in config.blocks:
            self.blocks.append(InvertedResidual(width, inside, kernel, step, outputs))
            width, stride = outputs, stride * step
            self._strides.append(stride)
        self.numbers = 2 * config.filters + 6
        self.numbers += sum(config.blocks[i][3] * (1 + (self._strides[i] < TOKEN_SIDE)) for i in config.taps)
        self.centre = nn.Parameter(torch.zeros(self.numbers, 1, 1), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(self.numbers, 1, 1), requires_grad=False)
        # Linear layers over the places of the grid, which quantisation leaves alone.
        self.hidden = nn.Conv2d(self.numbers, config.projection, 1)
        self.project = nn.Conv2d(config.projection, config.out_hidden_size, 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Visual tokens of pictures of any sizes; those of one size go through together.

        Args:
            pixel_values: ``(tokens, 3 * 32 * 32)``, normalised to [-1, 1], of all pictures one after the other, rows of
                a picture first; in float32 or wider, so that faint noise is not rounded away.
            grid_thw: ``(pictures, 3)``: 1, rows and columns of tokens.

        Returns:
            The tokens ``(tokens, out_hidden_size)`` as ``last_hidden_state`` and ``pooler_output``.
        """
        grids = [tuple(grid[1:]) for grid in grid_thw.tolist()]
        parts = list(pixel_values.split([rows * columns for rows, columns in grids]))
        for grid in dict.fromkeys(grids):
            places = [i for i, other in enumerate(grids) if other == grid]
            tokens = self.tokens(_pictures(torch.stack([parts[i] for i in places]), grid))
            for i, part in zip(places, tokens, strict=True):
                parts[i] = part
        tokens = torch.cat(parts)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Visual tokens ``(B, T, D)`` of pictures ``(B, 3, H, W)`` of one size, multiples of 32."""
        statistics = [self.pixel_statistics(pixels)]
        x = self.stem(pixels.to(self.stem.weight.dtype))
        x = self.run_blocks(x, range(len(self.blocks)), statistics)
        return self.merge(self.standardised(torch.cat(statistics, dim=1)))

    def run_blocks(self, x: Tensor, indices: range, statistics: list[Tensor]) -> Tensor:
        """Some of the blocks; what is tapped on the way is added to ``statistics``."""
        for i in indices:
            x = self.blocks[i](x)
            if i in self.config.taps:
                statistics.append(_squashed(_local(x, TOKEN_SIDE // self._strides[i])))
        return x

    def pixel_statistics(self, pixels: Tensor) -> Tensor:
        """Local strength of each filter's answer (mean size and root mean square, as logarithms), and of the colours.

        In float32 or wider whatever the weights are. Returns ``(B, 2 * filters + 6, H / 32, W / 32)``.
        """
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        margin = _FILTER_SIDE // 2
        answers = conv2d(pad(wide, (margin,) * 4, mode="replicate"), self.filters.to(wide.dtype))
        size, power = avg_pool2d(answers.abs(), TOKEN_SIDE), avg_pool2d(answers.square(), TOKEN_SIDE)
        strengths = [(size + _FAINTEST).log(), (power + _FAINTEST**2).log() / 2]
        return torch.cat([*strengths, _local(wide, TOKEN_SIDE)], dim=1)

    def standardised(self, statistics: Tensor) -> Tensor:
        """Statistics ``(B, numbers, rows, columns)`` with mean 0 and deviation 1 over the training pictures."""
        return (statistics - self.centre.to(statistics.dtype)) * self.scale.to(statistics.dtype)

    def merge(self, numbers: Tensor) -> Tensor:
        """Standardised statistics to visual tokens ``(B, rows * columns, D)``."""
        tokens: Tensor = self.project(silu(self.hidden(numbers.to(self.hidden.weight.dtype))))
        return tokens.flatten(2).mT


def _pictures(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(B, rows * columns, 3 * 32 * 32)`` to pictures ``(B, 3, H, W)`` in channels-last memory."""
    patches = patches.unflatten(-1, (3, TOKEN_SIDE, TOKEN_SIDE)).unflatten(1, grid)
    pixels = patches.permute(0, 1, 4, 2, 5, 3)  # row, y, column, x, channel
    return pixels.flatten(1, 2).flatten(2, 3).contiguous().permute(0, 3, 1, 2)


def _local(x: Tensor, side: int) -> Tensor:
    """Means, and for more than one place standard deviations, over squares of ``side``, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if side == 1:
        return x
    mean = avg_pool2d(x, side)
    variance = avg_pool2d(x.square(), side) - mean.square()
    return torch.cat([mean, variance.clamp(min=1e-6).sqrt()], dim=1)


def _squashed(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


class NanoModel(Qwen2_5_VLModel):
    """Tower and language model."""

    config_class = NanoConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "InvertedResidual"]  # noqa: RUF012

    def __init__(self, config: NanoConfig) -> None:
        super(Qwen2_5_VLModel, self).__init__(config)  # its own would build another tower
        self.visual = NanoTower._from_config(config.vision_config)  # type: ignore[no-untyped-call]
        self.language_model = Qwen2_5_VLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()  # type: ignore[no-untyped-call]

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As Qwen2.5-VL's, but the pixels keep their precision."""
        tokens: Tensor = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        output = BaseModelOutputWithPooling(last_hidden_state=tokens)
        output["pooler_output"] = tokens.split(image_grid_thw.prod(-1).tolist())
        return output


class NanoForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The embedded model; everything but its tower is Qwen2.5-VL's."""

    config_class = NanoConfig
    _no_split_modules = NanoModel._no_split_modules

    def __init__(self, config: NanoConfig) -> None:
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = NanoModel(config)
        text = config.get_text_config()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


AutoModel.register(NanoConfig, NanoModel, exist_ok=True)
# What TRL loads its start model with where the class is not transformers' own.
AutoModelForCausalLM.register(NanoConfig, NanoForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(NanoConfig, NanoForConditionalGeneration, exist_ok=True)
