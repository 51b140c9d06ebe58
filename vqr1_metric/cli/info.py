"""``vqr1 info``: versions, devices and what a model is: what a bug report needs."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vqr1_metric import __version__
from vqr1_metric.cli.options import add_model_options, build_scorer
from vqr1_metric.protocol import PROMPT_VERSION

_PACKAGES = (
    "torch",
    "transformers",
    "torchmetrics",
    "diffusers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "peft",
    "trl",
    "bitsandbytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_model_options(parser, mode=False)


def run(args: argparse.Namespace) -> int:
    """Print what there is; with ``--model`` load that model and describe it."""
    facts = _environment()
    if args.model is not None:
        facts |= _model(args)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            print(f"{name:<18} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _environment() -> dict[str, Any]:
    import torch

    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices.append(f"cpu ({torch.get_num_threads()} threads)")
    facts: dict[str, Any] = {"vqr1_metric": __version__, "prompt": PROMPT_VERSION, "python": platform.python_version()}
    facts["system"] = platform.platform()
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts | {"devices": devices}


def _model(args: argparse.Namespace) -> dict[str, Any]:
    scorer = build_scorer(args)
    backend: Any = scorer.backend  # of this process, which has more to say than the protocol
    limits = scorer.pixel_config
    return {
        "model": backend.model_id,
        "revision": backend.revision,
        "type": backend.model.config.model_type,
        "weights": f"{sum(p.numel() for p in backend.model.parameters()) / 1e6:.1f} million, {backend.model.dtype}",
        "device": str(backend.device),
        "pixels": f"{limits.min_pixels} to {limits.max_pixels}; others are rescaled",
        "visual token": f"{limits.factor}x{limits.factor} pixels",
        "answer tree": f"{len(backend.trie)} tokens",
    }
