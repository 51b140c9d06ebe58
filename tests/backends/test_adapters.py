"""A LoRA adapter fits its base exactly, or is refused: never the base's scores under the adapter's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.loading import ModelSpec, load_model

peft = pytest.importorskip("peft", reason="peft comes with the extra 'train'")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Weights = dict[str, torch.Tensor]


def load(folder: Path) -> torch.nn.Module:
    return load_model(ModelSpec(str(folder), device="cpu", dtype="float32")).model


@pytest.fixture(scope="module")
def made(tiny_qwen2_5_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made, on layers of both parts, with a head of its own."""
    targets = ["q_proj", "qkv"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(tiny_qwen2_5_vl), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_qwen2_5_vl)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "adapter")


def change(folder: Path, weights: Callable[[Weights], Weights] | None = None, **settings: Any) -> Path:
    """The adapter with other weights and settings."""
    if weights is not None:
        path = folder / "adapter_model.safetensors"
        save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_it_is_merged_where_it_acts(adapter: Path, tiny_qwen2_5_vl: Path) -> None:
    before, after = load(tiny_qwen2_5_vl).state_dict(), load(adapter).state_dict()
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    wanted |= {f"model.visual.blocks.{i}.attn.qkv.weight" for i in range(2)}
    assert changed == wanted  # the head was saved as it was


def test_names_of_older_transformers_mean_the_same(adapter: Path) -> None:
    expected = load(adapter).state_dict()

    def old(weights: Weights) -> Weights:
        named = {key.replace("model.language_model.", "model."): value for key, value in weights.items()}
        return {
            key.replace("base_model.model.model.visual.", "base_model.model.visual."): v for key, v in named.items()
        }

    got = load(change(adapter, old)).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def drop_half(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if "layers.1." not in key}


def drop_b(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if "lora_B" not in key}


def both_names(weights: Weights) -> Weights:
    return {**weights, **{k.replace("model.language_model.", "model."): v.clone() for k, v in weights.items()}}


def wider(weights: Weights) -> Weights:
    return {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in weights.items()}


def with_nan(weights: Weights) -> Weights:
    next(value for key, value in weights.items() if "lora_A" in key)[0, 0] = torch.nan
    return weights


MISFITS = {
    "other layers": (lambda w: {k.replace("layers.", "layers.7"): v for k, v in w.items()}, {}, "tensors are missing"),
    "no lora at all": (lambda w: {"unrelated": torch.ones(2)}, {}, "no tensor in it is one"),
    "half of it": (drop_half, {}, r"2 of its tensors are missing .*layers\.1"),
    "one factor only": (drop_b, {}, "4 of its tensors are missing"),
    "more than there is": (lambda w: {**w, "base_model.model.extra": torch.ones(2)}, {}, "1 of its tensors are unexp"),
    "both names": (both_names, {}, "under an old and a new name"),
    "another width": (wider, {}, r"has the shape \(2, "),
    "another rank": (None, {"r": 4}, "rank 4, .* but got 2"),
    "an enormous rank": (None, {"r": 10**9}, "rank 1000000000, .* but got 2"),
    "an enormous rank by pattern": (None, {"rank_pattern": {"q_proj": 10**9}}, "rank 1000000000, .* but got 2"),
    "a lower rank": (None, {"r": 1}, "has the shape"),
    "fewer modules": (None, {"target_modules": ["qkv"]}, "tensors are unexpected"),
    "more modules": (None, {"target_modules": ["q_proj", "qkv", "v_proj"]}, "tensors are missing"),
    "no such module": (None, {"target_modules": ["nothing"]}, "cannot be laid over its base"),
    "a pattern of others": (None, {"target_modules": r".*\.v_proj"}, "tensors are "),
    "NaN": (with_nan, {}, "holds NaN or infinity"),
    "another kind": (None, {"peft_type": "IA3"}, "one of type 'IA3'"),
    "no kind": (None, {"peft_type": ["LORA"]}, "one of type"),
    "a setting of the future": (None, {"use_telepathy": True}, "uses use_telepathy, which is not known here"),
    "a module to import": (None, {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "uses megatron_config"),
    "a rank in words": (None, {"r": "two"}, "whole numbers above 0 as r"),
    "rank 0": (None, {"r": 0}, "whole numbers above 0 as r"),
    "an endless scale": (None, {"lora_alpha": float("inf")}, "expected numbers as lora_alpha"),
    "no scale": (None, {"lora_alpha": None}, "expected numbers as lora_alpha"),
    "patterns as a list": (None, {"rank_pattern": ["q_proj"]}, "expected an object as rank_pattern"),
    "no pattern": (None, {"target_modules": "(q_proj"}, "expected regular expressions"),
    "no base": (None, {"base_model_name_or_path": None}, "expected the name of the adapter's base"),
    "a base that is not there": (None, {"base_model_name_or_path": "/no/such/base"}, "No model folder at"),
    "a number as the base": (None, {"base_model_name_or_path": 7}, "expected the name of the adapter's base"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_in_one_sentence(adapter: Path, name: str) -> None:
    weights, settings, message = MISFITS[name]
    change(adapter, weights, **settings)
    with pytest.raises(ModelError, match=message) as caught:
        load(adapter)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_without_end_is_cut_off(adapter: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqr1_metric.backends.adapters._PATTERN_SECONDS", 1.0)
    endless = r"((\w+\.?)+)+!"
    change(adapter, None, **{where: {endless: 2} if where.endswith("pattern") else endless})
    with pytest.raises(ModelError, match="a pattern of module names does not come to an end"):
        load(adapter)


def test_an_adapter_on_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    second = shutil.copytree(adapter, tmp_path / "second")
    change(second, None, base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match=r"is an adapter itself\. Merge the base first"):
        load(second)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_adapter_config(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json: expected"):
        load(adapter)


def test_damaged_adapter_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="the adapter's weights are damaged"):
        load(adapter)


def test_global_random_numbers_are_left_alone(adapter: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load(adapter)
    assert torch.equal(torch.rand(1), expected)
