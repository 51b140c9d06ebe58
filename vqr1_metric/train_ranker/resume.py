"""What a run leaves in its folder, and whether another can go on from it: by content, not by the names of folders."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqr1_metric.train_ranker.checks import ConfigError
from vqr1_metric.train_ranker.config import RankerConfig

#: Sizes and hashes of the other files of a checkpoint, written last.
MANIFEST = "files.json"
#: What a run is: data, processes, start model and its figures.
RECORD = "data.json"
#: Without these a checkpoint cannot be continued; those of DeepSpeed and FSDP keep optimisers elsewhere.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def check_output(output: Path, config: RankerConfig, record: Mapping[str, Any] | None, resume: bool) -> Path | None:
    """The checkpoint to continue from; None for a start from the beginning.

    Args:
        output: the folder of the run.
        config: its settings.
        record: ``data`` and ``processes`` of this launch; None on processes that have not opened the images.
        resume: whether to continue.

    Raises:
        ConfigError: results are in the way, the run to continue is another one, or none of its checkpoints is sound.
    """
    checkpoints = _checkpoints(output)
    if not resume:
        if checkpoints or (output / "config.json").is_file() or (output / "adapter").is_dir():
            raise ConfigError(
                f"Expected an output folder without a run in it, but {output} holds one: resume it (--resume), or "
                "choose another folder."
            )
        return None
    if not (output / "ranker.json").is_file():
        raise ConfigError(f"Expected a run to resume in {output}, but it has no ranker.json.")
    before = RankerConfig.load(output)
    different = config.differences(before)
    if different:
        name, (now, then) = next(iter(different.items()))
        raise ConfigError(
            f"Expected the settings of the run in {output}, but {name} is {now!r} and was {then!r}"
            + (f" ({len(different) - 1} more differ)" if len(different) > 1 else "")
            + ". A resumed run must be the same run; to train further otherwise, start a new one from its model."
        )
    if record is not None and (output / RECORD).is_file():
        then = read_record(output)
        if then.get("processes", record["processes"]) != record["processes"]:
            raise ConfigError(
                f"Expected {then['processes']} processes, as the run in {output} had, but got {record['processes']}: "
                "another number makes another batch. Launch as many, or start a new run from its model."
            )
        if then["data"] != record["data"]:
            raise ConfigError(f"Expected the data of the run in {output}, but pictures or scores have changed since.")
    return _newest_sound(output, checkpoints, config, before, int(record["processes"]) if record else 1)


def read_record(output: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote."""
    found: dict[str, Any] = json.loads((output / RECORD).read_text(encoding="utf-8"))
    return found


def write_record(output: Path, **record: Any) -> None:
    """Note what the run is."""
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def last_checkpoint(output: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint that is whole, None if there is none."""
    return next((folder for folder in _checkpoints(output) if damage(folder, processes) is None), None)


def _checkpoints(output: Path) -> list[Path]:
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _newest_sound(
    output: Path, checkpoints: list[Path], config: RankerConfig, before: RankerConfig, processes: int
) -> Path | None:
    problems = []
    for folder in checkpoints:
        problem = damage(folder, processes)
        if problem is not None:
            problems.append(f"{folder.name}: {problem}")
            continue
        if problems:
            warnings.warn(f"Passed over {'; '.join(problems)}. Going on from {folder.name}.", stacklevel=2)
        if 0 < config.max_steps < step_of(folder):
            raise ConfigError(
                f"Expected max_steps above the {step_of(folder)} steps of the run in {output}, but got "
                f"{config.max_steps}."
            )
        if (config.max_steps, config.epochs) != (before.max_steps, before.epochs):
            warnings.warn(
                f"The run in {output} has another length than before; from here on the learning rate follows the new "
                "one.",
                stacklevel=2,
            )
        return folder
    if any((folder / _NEEDED[0]).is_file() for folder in checkpoints):
        raise ConfigError(
            f"Expected a whole checkpoint in {output}, but got {'; '.join(problems)}. Start anew in another folder."
        )
    return None


def write_manifest(checkpoint: Path) -> None:
    """Note sizes and hashes of a checkpoint's files; of sharded ones, which are large and many, the sizes alone."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sharded = _is_sharded(checkpoint)
    told = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": None if sharded else _sha256(path)}
        for path in files
    }
    (checkpoint / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def damage(checkpoint: Path, processes: int = 1) -> str | None:
    """What keeps a checkpoint from being continued, None if nothing does."""
    sharded = _is_sharded(checkpoint)
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in (*(_NEEDED[:1] if sharded else _NEEDED), *states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    manifest = checkpoint / MANIFEST
    try:
        told = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        for name, noted in told.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != noted["size"] or noted["sha256"] not in (None, _sha256(path)):
                return f"{name} is damaged"
        json.loads((checkpoint / _NEEDED[0]).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"it cannot be read ({error})"
    if not told:  # killed before its manifest was written, or of version 0.1.0
        for path in checkpoint.iterdir():
            if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                return f"{path.name} is damaged"
            if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
                return f"{path.name} is damaged"
    return None


def _is_sharded(checkpoint: Path) -> bool:
    return any(checkpoint.glob("global_step*")) or any(checkpoint.glob("optimizer_*"))  # DeepSpeed, FSDP


def _is_whole_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # compares the header with the length of the file
            return True
    except (SafetensorError, OSError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
