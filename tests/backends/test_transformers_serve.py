"""The protocol against a server that this project did not write: transformers' own, which states no probabilities."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vqr1_metric.backends.base import Sampling
from vqr1_metric.backends.http import HttpBackend, RequestRefused

pytest.importorskip("openai", reason="transformers serve needs it")

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_llava(folder: Path) -> Path:
    """A random model with pictures whose processor runs without torchvision (Qwen2.5-VL's does not)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(**small, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_transformers_serve(tmp_path: Path):
    model = str(tiny_llava(tmp_path / "llava"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        backend = HttpBackend(f"{address}/v1", model, fallback_samples=2, tries=2)
        backend._fallback = Sampling(num_samples=2, max_new_tokens=8)
        images = [torch.randint(0, 256, (3, 56, 84), dtype=torch.uint8)] * 2
        replies = backend.sample_replies(
            images, backend.pixel_config, Sampling(num_samples=3, max_new_tokens=8), thinking=True, add_vision_id=True
        )
        assert [len(texts) for texts in replies] == [3, 3] and all(map(all, replies))
        with pytest.warns(UserWarning, match="takes no requests for log-probabilities.*2 sampled replies"):
            read = backend.distributions(images, backend.pixel_config)
        assert read.probabilities.shape == (2, 401) and read.coverage.tolist() == [0, 0]  # random weights say nothing
        with pytest.raises(RequestRefused, match="refused a request with 422"):
            HttpBackend(f"{address}/v1", model, extra={"no_such_field": 1}).sample_replies(
                images, backend.pixel_config, Sampling(num_samples=1), thinking=False, add_vision_id=False
            )
    finally:
        server.terminate()
        server.wait(timeout=30)
