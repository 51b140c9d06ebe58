"""Every preset runs three steps with its own settings, scaled down: sampled and exact, thinking and not."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqr1_metric.backends.loading import EMBEDDED
from vqr1_metric.train_ranker.config import PRESETS, RankerConfig
from vqr1_metric.train_ranker.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("trl_trainer"),
]
WAYS = {"thinking": ("sampled", True), "plain": ("sampled", False), "exact": ("exact", False)}
#: Sizes alone; what a preset is about stays as it is.
SMALL = {
    "images_per_device": 2,
    "images_per_comparison": 2,
    "num_generations": 2,
    "micro_batch": 2,
    "max_new_tokens": 48,
    "max_pixels": 64 * 64,
    "dtype": "float32",
    "max_steps": 3,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-5,
}


#: These run in every test run, the other combinations with the slow ones.
ALWAYS = {("paper", "thinking"), ("80gb-lora", "plain"), ("24gb-4bit", "exact"), ("nano", "exact")}


@pytest.mark.parametrize(
    ("preset", "way"),
    [
        pytest.param(preset, way, marks=[] if (preset, way) in ALWAYS else pytest.mark.slow)
        for preset in PRESETS
        for way in WAYS
    ],
)
def test_three_steps(preset: str, way: str, rated: Path, tmp_path: Path) -> None:
    objective, thinking = WAYS[way]
    quantised = PRESETS[preset].get("quantization")
    if quantised:
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="needs bitsandbytes with CPU kernels")
    held_out = PRESETS[preset].get("validation_fraction", 0.34)
    config = RankerConfig.preset(
        preset,
        **SMALL,
        model="nano",
        objective=objective,
        thinking=thinking,
        data=[str(rated / "noise.csv")],
        output_dir=str(tmp_path / "out"),
        validation_fraction=held_out,
        gradient_checkpointing=True,
    )
    config.check()
    said: list[str] = []
    output = train(config, tell=said.append)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "grad_norm" in entry]
    assert len(steps) == 3 and all(math.isfinite(entry["grad_norm"]) for entry in steps)
    assert max(entry["grad_norm"] for entry in steps) > 0 and max(entry["readable"] for entry in steps) > 0
    before = load_file(EMBEDDED["nano"] / "model.safetensors")
    after = load_file(output / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not (config.freeze_vision and any("visual" in name for name in changed))
    if held_out:
        assert any("eval_srcc_noise" in entry for entry in log)
        assert said[0].startswith("validation of the start model: SRCC noise ") and "at the start" in said[2]
