"""The tiny checkpoints are fit to test with: they cut answers as Qwen does, load strictly and look at the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny_models import FAMILIES, build_tiny_model


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<answer>3.42</answer>", ["<", "answer", ">", "3", ".", "4", "2", "</", "answer", ">"]),
        ("<answer> 5 </answer>", ["<", "answer", ">", " ", "5", " </", "answer", ">"]),
        ("<answer>\n1.5\n</answer>", ["<", "answer", ">\n", "1", ".", "5", "\n", "</", "answer", ">"]),
        ("think>\n\n<answer>", ["think", ">\n\n", "<", "answer", ">"]),
        ("think><answer>", ["think", "><", "answer", ">"]),
    ],
)
def test_tokenizer_cuts_the_answer_as_qwen_does(tiny_model: Path, text: str, pieces: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == pieces


def test_only_qwen3_has_think_tags_as_tokens(tiny_qwen2_5_vl: Path, tiny_qwen3_vl: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(tiny_qwen3_vl)("<think></think>")["input_ids"]) == 2
    assert len(AutoTokenizer.from_pretrained(tiny_qwen2_5_vl)("<think></think>")["input_ids"]) > 2


def test_loads_strictly_and_sees_the_picture(tiny_model: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_model, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Rate the picture."}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    logits = []
    for seed in range(2):
        # 200 x 260 pixels: more than one attention window of Qwen2.5-VL in each direction.
        pixels = np.random.default_rng(seed).integers(0, 256, (200, 260, 3), dtype=np.uint8)
        vision = processor(images=[pixels], return_tensors="pt")
        blocks = int(vision["image_grid_thw"].prod()) // 4
        inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * blocks), return_tensors="pt")
        kinds = (inputs["input_ids"] == model.config.image_token_id).long()
        with torch.no_grad():
            logits.append(model(**inputs, **vision, mm_token_type_ids=kinds).logits[0, -1])
    assert logits[0].std() > 1  # not flat
    assert (logits[0] - logits[1]).abs().max() > 0.05  # noise against other noise


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_weights(tmp_path: Path, family: str) -> None:
    files = [
        build_tiny_model(tmp_path / str(i), family, seed=seed, dtype=torch.float64) / "model.safetensors"
        for i, seed in enumerate((7, 7, 8))
    ]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second != other


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected family to be one of"):
        build_tiny_model(tmp_path, "qwen9_vl")
