"""ZeRO-3 on two CPU processes over gloo: all weights and LoRA, validation, resuming, ranks whose replies differ."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher import finish, launch, weights

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytest.importorskip("trl", minversion="1.16", reason="RL with sampled replies needs trl 1.16")
pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("zero3_worker.py")
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


def command(rated: Path, model: Path, output: Path, folder: Path, **more: object) -> list[str]:
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    settings = {
        "thinking": False,
        "images_per_device": 4,
        "images_per_comparison": 4,
        "num_generations": 2,
        "micro_batch": 4,
        "max_new_tokens": 16,
        "max_pixels": 3136,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "validation_fraction": 0.34,
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "dtype": "float32",
        "trainer.deepspeed": str(folder / "zero3.json"),
        **more,
    }
    told = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [str(WORKER), "--data", str(rated / "noise.csv"), "--model", str(model), "-o", str(output), *told]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_run_with_validation_that_resumes_bit_by_bit(
    lora_rank: int, rated: Path, warm_model: Path, tmp_path: Path
) -> None:
    more = {"lora_rank": lora_rank}
    finish(launch(*command(rated, warm_model, tmp_path / "whole", tmp_path, **more)))
    log = json.loads((tmp_path / "whole/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_srcc_noise" in entry] == [2, 4]
    finish(launch(*command(rated, warm_model, tmp_path / "broken", tmp_path, **more, max_steps=2)))
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        (tmp_path / "broken" / name).unlink()
    finish(launch(*command(rated, warm_model, tmp_path / "broken", tmp_path, **more), "--resume"))
    expected, found, start = weights(tmp_path / "whole"), weights(tmp_path / "broken"), weights(warm_model)
    assert expected.keys() == found.keys() == start.keys()
    assert any(not torch.equal(expected[name], start[name]) for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_ranks_whose_replies_differ_take_the_same_passes(rated: Path, warm_model: Path, tmp_path: Path) -> None:
    """A micro batch of one picture: on one process its two replies are soon equal, on the other they are not."""
    more = {"images_per_device": 2, "images_per_comparison": 2, "micro_batch": 2, "temperature": 0.5, "max_steps": 10}
    whole = command(rated, warm_model, tmp_path / "out", tmp_path, **more, validation_fraction=0, save_steps=100)
    finish(launch(*whole))
    replies = [json.loads(line)["reply"] for line in (tmp_path / "out/replies.jsonl").read_text().splitlines()]
    equal = [a == b for a, b in zip(replies[::2], replies[1::2], strict=True)]
    assert any(equal) and not all(equal)  # else the test would show nothing
    assert load_file(tmp_path / "out/model.safetensors")
