"""The authors' procedure for non-thinking batches, written anew from its description (README of VisualQuality-R1).

Batches of 32: the processor on the CPU, one picture after the other; left padding; ``generate`` with sampling (top_k
50, top_p 1); the first number of the last answer. Two favours: every reply is cut after ten tokens, the length of
``<answer>3.52</answer>``, where theirs end by themselves; and tensors become Pillow pictures without a file between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.protocol import messages, parse_reply

BATCH, REPLY_TOKENS = 32, 10


def authors_scores(
    backend: TransformersBackend, images: Sequence, max_pixels: int, replies: int = 1
) -> Iterator[list[float]]:
    """Scores of one batch after the other, NaN where a reply holds none; several replies give their mean."""
    try:
        from transformers import Qwen2VLImageProcessorPil as Processor
    except ImportError:  # before it had a name of its own
        from transformers import Qwen2VLImageProcessor as Processor

    config = backend.pixel_config.with_limits(max_pixels=max_pixels)
    processor = Processor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    )
    tokenizer, model = backend.tokenizer, backend.model
    chat = tokenizer.apply_chat_template(
        messages(False),
        chat_template=backend._chat_template,
        add_generation_prompt=True,
        tokenize=False,
        add_vision_id=True,
    )
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    for start in range(0, len(images), BATCH):
        pictures = [_pillow(image) for image in images[start : start + BATCH]]
        pixels = processor(images=pictures, return_tensors="pt")
        tokens = pixels["image_grid_thw"].prod(1) // config.merge_size**2
        texts = [chat.replace(image_token, image_token * int(count)) for count in tokens]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **pixels}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        inputs = {name: tensor.to(backend.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            output = model.generate(
                **inputs,
                do_sample=True,
                top_k=50,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                num_return_sequences=replies,
                min_new_tokens=REPLY_TOKENS,
                max_new_tokens=REPLY_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = torch.tensor([parse_reply(text).score for text in said]).view(len(pictures), replies)
        yield scores.nanmean(1).tolist()


def _pillow(image) -> Image.Image:
    if isinstance(image, torch.Tensor):
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if isinstance(image, Image.Image):
        return image
    with Image.open(image) as opened:
        return opened.convert("RGB")
