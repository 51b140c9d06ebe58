"""A model on the Hugging Face Hub as a folder on this machine."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from vqr1_metric.backends.base import ModelError

#: What a model consists of beside its weights; nothing else is downloaded, least of all code or pickled weights.
_SMALL = ("*.json", "*.jinja", "merges.txt")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@lru_cache
def fetch(name: str, revision: str | None) -> Path:
    """The folder with the files of a model on the Hub, downloaded if need be; its name is the commit.

    The Hub is asked once in a process, so that a branch that moves meanwhile does not change the scores of a run.

    Raises:
        ModelError: says what was looked for and what to use instead.
    """
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"No model folder at {name!r}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    _check_hub(name, revision)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_SMALL)))
        weights = list(_WEIGHTS)
        if (folder / _INDEX).is_file():
            weights += sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=weights))
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(_unreachable(name, revision)) from error


def _check_hub(name: str, revision: str | None) -> None:
    """Fail at once where there is no network and nothing was downloaded: the look-up itself retries for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for file in ("config.json", "adapter_config.json"):
            if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
                return
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # the Hub answered, or need not be asked: the look-up says what is wrong
    except Exception as error:  # whatever the HTTP library of the day calls "no connection"
        raise ModelError(_unreachable(name, revision)) from error


def _unreachable(name: str, revision: str | None) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"Could not get the model {name!r}{at}: there is no such folder, and on the Hugging Face Hub it "
        "was not found, or the Hub cannot be reached. Offline, use --model nano (model='nano'), which comes with this "
        "package, or the path of a folder that holds the downloaded model."
    )
