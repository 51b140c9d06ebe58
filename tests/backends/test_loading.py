"""Loading is strict and says what is wrong; the published 7B layout fits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqr1_metric.backends.base import ModelError, ScoringBackend
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.transformers import TransformersBackend


@pytest.fixture
def folder(tiny_qwen2_5_vl, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_qwen2_5_vl, tmp_path / "model")


def spec(path, **options):
    return ModelSpec(str(path), **{"device": "cpu", **options})


def legacy_names(layers, blocks):
    """Tensor names of the published checkpoints (model.safetensors.index.json of Qwen2.5-VL), written out."""
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"]
    names += ["visual.merger.ln_q.weight"]
    names += [f"visual.merger.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    for i in range(layers):
        own = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"]
        own += [f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")]
        own += [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
        names += [f"model.layers.{i}.{name}" for name in own]
    for i in range(blocks):
        own = ["norm1.weight", "norm2.weight"]
        own += [f"attn.{x}.{kind}" for x in ("qkv", "proj") for kind in ("weight", "bias")]
        own += [f"mlp.{x}_proj.{kind}" for x in ("gate", "up", "down") for kind in ("weight", "bias")]
        names += [f"visual.blocks.{i}.{name}" for name in own]
    return names


def test_the_published_7b_layout_fits_the_model():
    """729 legacy names, 8.29 billion weights, built on the meta device from the published configuration."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
    mapping = [m for m in get_model_conversion_mapping(model) if isinstance(m, WeightRenaming)]
    names = legacy_names(28, 32)
    state = model.state_dict()
    renamed = {rename_source_key(name, mapping, [], model.base_model_prefix, state)[0] for name in names}
    assert len(names) == 729
    assert renamed == set(state)


def test_a_checkpoint_with_legacy_names_loads_the_same_weights(folder):
    """transformers writes the published (legacy) names; they must arrive, bit for bit, under the new ones."""
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(legacy_names(2, 2))
    state = load_model(spec(folder, dtype="float32")).model.state_dict()
    for old, new in (("model.norm.weight", "model.language_model.norm.weight"), ("visual.blocks.1.norm2.weight",) * 2):
        torch.testing.assert_close(stored[old], state[new if new in state else "model." + new])


def test_all_families_load_and_satisfy_the_protocol(tiny_model):
    backend = TransformersBackend(spec(tiny_model))
    assert isinstance(backend, ScoringBackend)
    assert backend.revision.startswith("sha256:")
    assert all(not p.requires_grad for p in backend.model.parameters()) and not backend.model.training


def test_patch_size_comes_from_the_models_own_configuration(tiny_qwen2_5_vl, tiny_qwen3_vl):
    sizes = [TransformersBackend(spec(f)).pixel_config.patch_size for f in (tiny_qwen2_5_vl, tiny_qwen3_vl)]
    assert sizes == [14, 16]


def test_revision_names_the_weights(folder):
    before = load_model(spec(folder)).revision
    assert load_model(spec(folder)).revision == before
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(spec(folder)).revision != before


@pytest.mark.parametrize(("change", "kind"), [("drop", "missing"), ("add", "unexpected")])
def test_missing_and_unexpected_tensors_are_errors(folder, change, kind):
    weights = load_file(folder / "model.safetensors")
    if change == "drop":
        del weights["visual.blocks.1.mlp.up_proj.weight"]
    else:
        weights["visual.blocks.9.norm1.weight"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 tensors are {kind} \(.*visual"):
        load_model(spec(folder))


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model: the weights are damaged"):
        load_model(spec(folder))


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(spec(folder))


def test_unknown_models(tmp_path):
    with pytest.raises(ModelError, match=r"nobody/nothing.*--model nano"):
        load_model(spec("nobody/nothing"))
    with pytest.raises(ModelError, match="No model folder at '/no/such/folder'"):
        load_model(spec("/no/such/folder"))
    with pytest.raises(ModelError, match=r"expected a model in this folder, but it holds no config\.json"):
        load_model(spec(tmp_path))
    with pytest.raises(ModelError, match="only with a name on the Hub, but got 'v9' with the local model 'nano'"):
        load_model(spec("nano", revision="v9"))
    with pytest.raises(ModelError, match=r"revision 'v9'.*HF_HUB_OFFLINE forbids to ask the Hugging Face Hub"):
        load_model(spec("TianheWu/VisualQuality-R1-7B", revision="v9"))
    with pytest.raises(ModelError, match="--model nano"):
        load_model(spec("not a valid name!"))


def test_other_architectures_are_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"qwen2_5_vl.* but got 'llama'"):
        load_model(spec(folder))


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "chat_template.jinja"])
def test_incomplete_folders(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        load_model(spec(folder))


def test_sliding_window_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(use_sliding_window=True, sliding_window=16, max_window_layers=0)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="use_sliding_window"):
        load_model(spec(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int7"}, "dtype to be one of"),
        ({"quantization": "3bit"}, "'8bit' or '4bit'"),
        ({"attn_implementation": "flash_attention_2"}, "attention that takes a mask.*sdpa, eager"),
        ({"attn_implementation": "flex_attention"}, "attention that takes a mask.*sdpa, eager"),
        ({"device": "toaster"}, "a device such as"),
        ({"device": "cuda"}, "sees no CUDA GPU"),
    ],
)
def test_bad_options_fail_before_anything_loads(options, message):
    with pytest.raises(ModelError, match=message):
        ModelSpec("nano", **options)


def test_dtypes_are_one_spelling():
    assert (
        ModelSpec("nano", dtype="bf16")
        == ModelSpec("nano", dtype=torch.bfloat16)
        == ModelSpec("nano", dtype="bfloat16")
    )


def test_quantisation_without_its_library_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'vqr1-metric\[quant\]'"):
        load_model(spec(folder, quantization="8bit"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapter_folder_loads_on_its_base(folder, tmp_path):
    """A real adapter, made by peft, merged into its base: other weights where it acts, the same elsewhere."""
    peft = pytest.importorskip("peft", reason="peft comes with the extra 'train'")
    base = load_model(spec(folder, dtype="float32")).model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.peft_config["default"].revision = "main"  # of a base from the Hub, since copied into a folder
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(spec(tmp_path / "adapter", dtype="float32")).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_an_adapter_without_peft_says_what_to_install(folder, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'vqr1-metric\[train\]'"):
        load_model(spec(tmp_path / "adapter"))
