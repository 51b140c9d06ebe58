"""Model folders that are changed, one file at a time."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

#: Files of a model, and the entry of the identity that each of them decides.
CHANGES = {
    "model.safetensors": "weights",
    "chat_template.jinja": "chat_template",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "preprocessor_config.json": "preprocessor",
    "config.json": "config",
    "generation_config.json": "generation",
}


def change_file(path: Path) -> None:
    """Another content that still loads; for weights, tokenizer, template and preprocessor one that scores otherwise."""
    if path.suffix == ".safetensors":
        weights = load_file(path)
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name] = weights[name].flip(0).contiguous()
        save_file(weights, path, metadata={"format": "pt"})
        return
    if path.suffix == ".jinja":
        path.write_text(path.read_text().replace("assistant", "helper"))
        return
    values = json.loads(path.read_text())
    if path.name == "preprocessor_config.json":
        values["image_mean"] = [0.1, 0.2, 0.3]
    elif path.name == "tokenizer.json":
        values["model"]["merges"].reverse()
    elif path.name == "tokenizer_config.json":
        values["eos_token"] = "<|endoftext|>"
    elif path.name == "generation_config.json":
        values["eos_token_id"] = values["eos_token_id"][:1]
    else:
        values.get("text_config", values)["rms_norm_eps"] = 0.01
    path.write_text(json.dumps(values))
