"""The launch settings that are shipped are ones that accelerate reads."""

from importlib.resources import files

import pytest
from accelerate.commands.config.config_args import load_config_from_file


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_shipped_configs(name: str, kind: str) -> None:
    config = load_config_from_file(str(files("vqr1_metric.train_ranker") / "configs" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and config.num_processes == 8
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3 and config.deepspeed_config["zero3_init_flag"]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
