"""Configuration of the embedded model: a convolutional tower before the language model of Qwen2.5-VL."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

from vqr1_metric.nano import MODEL_TYPE

TOKEN_SIDE = 32
"""Side in pixels of the square that one visual token stands for."""

#: (channels inside, kernel, stride, channels out) of the blocks of EfficientNet-Lite2.
LITE2 = (
    [(32, 3, 1, 16), (96, 3, 2, 24)]
    + [(144, 3, 1, 24)] * 2
    + [(144, 5, 2, 48)]
    + [(288, 5, 1, 48)] * 2
    + [(288, 3, 2, 88)]
    + [(528, 3, 1, 88)] * 3
    + [(528, 5, 1, 120)]
    + [(720, 5, 1, 120)] * 3
    + [(720, 5, 2, 208)]
    + [(1248, 5, 1, 208)] * 4
    + [(1248, 3, 1, 352)]
)


class NanoVisionConfig(PretrainedConfig):
    """The convolutional tower.

    Args:
        stem: channels of the first convolution, of stride 2.
        blocks: ``(channels inside, kernel, stride, channels out)`` of each inverted residual block.
        taps: blocks whose local means and deviations a visual token is made of.
        filters: fixed filters over the pixels, whose local strength goes into a visual token too.
        projection: width of the hidden layer between those numbers and the visual token.
        out_hidden_size: width of a visual token, which is that of the language model.
    """

    model_type = "vqr1_nano_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        stem: int = 32,
        blocks: list[tuple[int, int, int, int]] | None = None,
        taps: tuple[int, ...] = (0, 3, 6, 10, 14, 20),
        filters: int = 8,
        projection: int = 512,
        out_hidden_size: int = 192,
        **kwargs: Any,
    ) -> None:
        self.stem = stem
        self.blocks = [tuple(block) for block in (LITE2 if blocks is None else blocks)]
        self.taps = tuple(taps)
        self.filters = filters
        self.projection = projection
        self.out_hidden_size = out_hidden_size
        self.patch_size = TOKEN_SIDE
        self.spatial_merge_size = 1
        self.temporal_patch_size = 1
        self.tokens_per_second = 1
        # What plans the size of a batch multiplies these: the largest activation of one token's 32x32 pixels.
        self.hidden_size = stem
        side = TOKEN_SIDE // 2
        largest = stem * side**2
        for inside, _, stride, out in self.blocks:
            largest, side = max(largest, inside * side**2, out * (side // stride) ** 2), side // stride
        self.intermediate_size = largest
        super().__init__(**kwargs)


class NanoConfig(Qwen2_5_VLConfig):
    """As that of Qwen2.5-VL, with :class:`NanoVisionConfig` for the tower."""

    model_type = MODEL_TYPE
    #: No code comes with the weights. Said because TRL asks every class that is not transformers' own for it.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": NanoVisionConfig,
        "text_config": Qwen2_5_VLTextConfig,
    }


AutoConfig.register(NanoVisionConfig.model_type, NanoVisionConfig, exist_ok=True)
AutoConfig.register(MODEL_TYPE, NanoConfig, exist_ok=True)
