"""What cannot run on a CPU is at least read by those who will run it: accelerate, TRL and PEFT take our settings."""

import json
from importlib.resources import files
from pathlib import Path

import accelerate
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging.version import Version

from vqr1_metric.train_ranker.config import PRESETS, RankerConfig

CONFIGS = files("vqr1_metric.train_ranker") / "configs"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_shipped_configs(name: str, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and config.num_processes == 8
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3 and config.deepspeed_config["zero3_init_flag"]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_accelerate_launch_takes_every_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that `accelerate launch` has no option for would be dropped without a word."""
    if name == "fsdp2" and Version(accelerate.__version__) < Version("1.6"):
        pytest.skip("accelerate knows FSDP2 from 1.6 on")
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True, raising=False)
    more = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    command = [
        "--config_file",
        str(CONFIGS / f"{name}.yaml"),
        *more,
        "-m",
        "vqr1_metric.train_ranker",
        "--data",
        "a.csv",
    ]
    args = launch_command_parser().parse_args(command)
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    nested = {**getattr(config, "deepspeed_config", {}), **getattr(config, "fsdp_config", {})}
    assert nested.keys() <= vars(args).keys()
    args, _, _ = _validate_launch_command(args)
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 1)
    assert args.training_script == "vqr1_metric.train_ranker" and args.training_script_args == ["--data", "a.csv"]
    assert (args.use_deepspeed, args.use_fsdp) == (name == "zero3", name == "fsdp2")
    for key, value in nested.items():
        assert str(getattr(args, key)).lower() == str(value).lower(), key


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "nano"])
@pytest.mark.parametrize("use_vllm", [False, True])
def test_trl_takes_the_presets(preset: str, use_vllm: bool, trl_trainer, tmp_path: Path) -> None:
    config = RankerConfig.preset(
        preset,
        data=["a.csv"],
        output_dir=str(tmp_path),
        use_vllm=use_vllm,
        trainer={"vllm_gpu_memory_utilization": 0.4, "vllm_tensor_parallel_size": 1},
    )
    args = trl_trainer.grpo_config(config)
    assert args.use_vllm is use_vllm and args.vllm_gpu_memory_utilization == 0.4
    assert args.vllm_mode == "colocate" or not use_vllm
    assert args.generation_batch_size == config.images_per_device * config.num_generations
    if config.lora_rank:
        from vqr1_metric.train_ranker.policy import lora_config

        adapter = lora_config(config)
        assert (adapter.r, adapter.lora_alpha) == (config.lora_rank, 2 * config.lora_rank)
        assert bool(adapter.exclude_modules) == config.freeze_vision


def test_a_deepspeed_file_is_passed_on(trl_trainer, tmp_path: Path) -> None:
    """`--set trainer.deepspeed=FILE`, for those who do not launch through accelerate."""
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    file = tmp_path / "zero3.json"
    settings = {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
    }
    file.write_text(json.dumps(settings))
    config = RankerConfig.preset("paper", data=["a.csv"], output_dir=str(tmp_path), trainer={"deepspeed": str(file)})
    assert trl_trainer.grpo_config(config).deepspeed == str(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_four_bit_weights_under_lora(
    trl_trainer, rated: Path, settings: dict, warm_model: Path, tmp_path: Path
) -> None:
    """The 24 GB preset at the size of the tiny model: bitsandbytes has 4-bit weights on a CPU too."""
    pytest.importorskip("bitsandbytes", minversion="0.50", reason="needs bitsandbytes with CPU kernels")
    import torch
    from safetensors.torch import load_file

    from vqr1_metric import QualityScorer
    from vqr1_metric.train_ranker.run import train

    more = {"images_per_device": 4, "images_per_comparison": 4, "num_generations": 3, "micro_batch": 2}
    size = {
        name: settings[name] for name in ("data", "thinking", "max_new_tokens", "max_pixels", "validation_fraction")
    }
    config = RankerConfig.preset(
        "24gb-4bit",
        **{**size, **more},
        model=str(warm_model),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        learning_rate=1e-3,
        dtype="float32",
    )
    train(config)
    before, after = load_file(warm_model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)  # the vision tower is frozen
    (score,) = QualityScorer(str(tmp_path / "out"), max_pixels=56 * 56).score([rated / "0.png"])
    assert 1 <= score.score <= 5
