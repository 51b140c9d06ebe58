"""What TRL calls a processor: prompts and pictures in, model inputs out, by the code that scores pictures too.

The processors of transformers need torchvision (for videos) and resize with Pillow; this one reads pictures with
:mod:`vqr1_metric.images` and cuts them with :mod:`vqr1_metric.backends.pixels`, so that a model is trained on exactly
the pixels it will be scored with, and it does so once for the K replies of a picture.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vqr1_metric.backends.loading import LoadedModel
from vqr1_metric.backends.pixels import PixelConfig, to_patches
from vqr1_metric.images import load_image
from vqr1_metric.nano import MODEL_TYPE
from vqr1_metric.ratings import RatedImage

_PROCESSORS = {
    "qwen2_vl": ("Qwen2VLImageProcessor", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"),
    "qwen3_vl": ("Qwen2VLImageProcessorFast", "Qwen3VLProcessor"),
    "qwen3_vl_moe": ("Qwen2VLImageProcessorFast", "Qwen3VLProcessor"),
    MODEL_TYPE: ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"),
}


class RankerProcessor(ProcessorMixin):
    """Model inputs from chats whose pictures are indices (as text) into a list of rated pictures.

    Args:
        loaded: the model's tokenizer, chat template and pixel settings.
        pictures: what the indices refer to.
        pixel_config: the pixel settings to use instead of the model's own.
        cache_size: so many prepared pictures are kept: those of one step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        pictures: Sequence[RatedImage],
        pixel_config: PixelConfig | None = None,
        cache_size: int = 16,
    ) -> None:
        # ProcessorMixin.__init__ asks for image and video processors; what TRL calls of it is defined below.
        self.tokenizer: Any = loaded.tokenizer
        self.chat_template: Any = loaded.chat_template
        self.pixel_config = pixel_config or loaded.pixel_config
        self.pictures = pictures
        config: Any = loaded.model.config
        self.image_token_id: int = config.image_token_id
        self.model_type: str = config.model_type
        self.decoded = 0
        self._cache: OrderedDict[str, tuple[Tensor, tuple[int, int, int]]] = OrderedDict()
        self._cache_size = cache_size

    def pixels(self, image: str) -> Tensor:
        """The picture of an index, uint8 ``(3, H, W)``."""
        picture = self.pictures[int(image)]
        return load_image(picture.read(), picture.name)

    def pil_image(self, image: str) -> Image.Image:
        """The picture of an index at the size that the model sees, for engines that prepare pictures themselves."""
        pixels = self.pixels(image)
        height, width = self.pixel_config.target_size(*pixels.shape[-2:])
        whole = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return whole.resize((width, height), Image.Resampling.BICUBIC)

    def patches(self, image: str) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches and grid of the picture of an index; the last ``cache_size`` are kept."""
        if image in self._cache:
            self._cache.move_to_end(image)
        else:
            self._cache[image] = to_patches(self.pixels(image), self.pixel_config)
            self.decoded += 1
            while len(self._cache) > max(1, self._cache_size):
                self._cache.popitem(last=False)
        return self._cache[image]

    def apply_chat_template(  # type: ignore[override]  # the arguments that TRL gives
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Texts of one chat or several; with ``tokenize`` model inputs, not padded."""
        single = isinstance(conversation[0], dict)
        chats = [conversation] if single else conversation
        texts = [
            self.tokenizer.apply_chat_template(
                chat,
                chat_template=chat_template or self.chat_template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for chat in chats
        ]
        if not tokenize:
            return texts[0] if single else texts
        images = [
            [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]
            for chat in chats
        ]
        return self(images=images, text=texts)

    def __call__(
        self,
        images: Sequence[Sequence[str]] = (),
        text: Sequence[str] = (),
        padding: bool = False,
        return_tensors: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Model inputs of texts with one placeholder for each picture.

        Lists of token ids, or with ``padding`` left-padded tensors; pixels and grids are tensors.
        """
        prepared = [[self.patches(image) for image in of_one] for of_one in images]
        rows = []
        for one, found in zip(text, prepared, strict=True):
            grids = iter(grid for _, grid in found)
            row: list[int] = []
            for token in self.tokenizer.encode(one, add_special_tokens=False):
                copies = 1
                if token == self.image_token_id:
                    _frames, rows_, columns = next(grids)
                    copies = rows_ * columns // self.pixel_config.merge_size**2
                row += [token] * copies
            rows.append(row)
        width = max(map(len, rows)) if padding else 0
        pads = [max(0, width - len(row)) for row in rows]
        pad_token = self.tokenizer.pad_token_id
        inputs: dict[str, Any] = {
            "input_ids": [[pad_token] * pad + row for pad, row in zip(pads, rows, strict=True)],
            "attention_mask": [[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)],
            # Without it the model numbers the visual tokens as if they were text.
            "mm_token_type_ids": [
                [0] * pad + [int(token == self.image_token_id) for token in row]
                for pad, row in zip(pads, rows, strict=True)
            ],
        }
        if padding:
            inputs = {name: torch.tensor(value) for name, value in inputs.items()}
        flat = [one for found in prepared for one in found]
        inputs["pixel_values"] = torch.cat([patches for patches, _ in flat])
        inputs["image_grid_thw"] = torch.tensor([grid for _, grid in flat])
        return inputs

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer does."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer does."""
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> list[str]:  # type: ignore[override]
        """Write the tokenizer, ``preprocessor_config.json`` and ``chat_template.jinja``, as released models do."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = list(self.tokenizer.save_pretrained(folder))
        config = self.pixel_config
        image_processor, processor = _PROCESSORS[self.model_type]
        settings = {
            "image_processor_type": image_processor,
            "processor_class": processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "patch_size": config.patch_size,
            "merge_size": config.merge_size,
            "temporal_patch_size": config.temporal_patch_size,
            "image_mean": config.mean,
            "image_std": config.std,
            "min_pixels": config.min_pixels,
            "max_pixels": config.max_pixels,
            "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        }
        files = {
            "preprocessor_config.json": json.dumps(settings, indent=2) + "\n",
            "chat_template.jinja": self.chat_template,
        }
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        return [*written, *(str(folder / name) for name in files)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.pictures)} pictures, {self.pixel_config})"
