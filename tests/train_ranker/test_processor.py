"""The processor gives the very inputs that scoring gives, and files that transformers and the scorer read."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.6")

from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.images import load_image
from vqr1_metric.protocol import question
from vqr1_metric.train_ranker.data import read_data
from vqr1_metric.train_ranker.processor import RankerProcessor


def test_the_inputs_are_those_of_scoring(tiny_model: Path, rated: Path, tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(str(tiny_model), device="cpu"))
    pictures = read_data([rated / "noise.csv"])[0].images
    processor = RankerProcessor(loaded, pictures)
    image = [{"type": "image", "image": "2"}, {"type": "text", "text": question(True)}]
    small = [{"type": "image", "image": "5"}, {"type": "text", "text": question(True)}]
    chats = [[{"role": "user", "content": content}] for content in (image, small)]
    listed = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    padded = processor(images=[["2"], ["5"]], text=texts, padding=True, return_tensors="pt")
    backend = TransformersBackend(ModelSpec(str(tiny_model)), loaded)
    pixels = [load_image(pictures[i].read()) for i in (2, 5)]
    expected = backend._inputs(pixels, loaded.pixel_config, True, None, False)
    expected.pop("position_ids")  # scoring numbers ahead of the pass, training leaves it to the model
    for name, value in expected.items():
        torch.testing.assert_close(padded[name].to(value.dtype), value)
    assert listed["input_ids"][0] == [int(t) for t in expected["input_ids"][0][expected["attention_mask"][0] == 1]]
    processor.save_pretrained(tmp_path)
    loaded.model.save_pretrained(tmp_path)
    again = load_model(ModelSpec(str(tmp_path), device="cpu"))
    assert again.pixel_config == loaded.pixel_config and again.chat_template == loaded.chat_template


def test_a_step_keeps_its_pictures(tiny_qwen2_5_vl: Path, rated: Path) -> None:
    loaded = load_model(ModelSpec(str(tiny_qwen2_5_vl), device="cpu"))
    processor = RankerProcessor(loaded, read_data([rated / "noise.csv"])[0].images, cache_size=2)
    for image in ("0", "1", "0", "1", "0"):
        processor.patches(image)
    assert processor.decoded == 2
    processor.patches("2")
    processor.patches("1")
    assert processor.decoded == 4  # "1" was used longest ago when "2" came
