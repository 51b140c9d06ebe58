"""A model on the Hugging Face Hub as a folder on this machine, or the reason why there is none."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from vqr1_metric.backends.base import ModelError, told
from vqr1_metric.backends.checkpoints import near_names

#: What a model consists of beside its weights; nothing else is downloaded, least of all code or pickled weights.
_SMALL = ("*.json", "*.jinja", "merges.txt")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
#: Seconds that the Hub may take to say that it is there.
_TIMEOUT = 10.0


@lru_cache
def fetch(name: str, revision: str | None) -> Path:
    """The folder with the files of a model on the Hub, downloaded if need be; its name is the commit.

    The Hub is asked once in a process, so that a branch that moves meanwhile does not change the scores of a run. Where
    it cannot be asked, what was downloaded before is used.

    Raises:
        ModelError: says which of the causes it is, and what to do.
    """
    if os.path.isabs(name) or name.startswith((".", "~")):
        raise ModelError(f"No model folder at {name!r}.{_perhaps(name)}")
    from huggingface_hub import snapshot_download

    try:
        _ask(name, revision)
        # By branch, not by commit: that is how it is found again where the Hub cannot be asked.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_SMALL)))
        shards = list(_WEIGHTS) + _shards(folder / _INDEX)
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=shards))
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ModelError(_why(name, revision, error)) from error


def _ask(name: str, revision: str | None) -> None:
    """Raise at once what the Hub or the network says, unless something was downloaded before: a download tries long."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(name, revision=revision, allow_patterns=list(_SMALL), local_files_only=True)
        except Exception:
            pass
        else:
            return
        raise


def _shards(index: Path) -> list[str]:
    if not index.is_file():
        return []
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # it is read again, and refused, with the model's other files


def _why(name: str, revision: str | None, error: BaseException) -> str:
    from huggingface_hub import constants, errors, is_offline_mode

    error = _first_cause(error)
    at = f" at revision {revision!r}" if revision else ""
    hub = "the Hugging Face Hub" if constants.ENDPOINT == "https://huggingface.co" else constants.ENDPOINT
    start = f"Could not get the model {name!r}{at}: "
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.HFValidationError):
        return f"{start}there is no such folder, and the Hub can hold no such name.{_perhaps(name)}{_ELSEWHERE}"
    if isinstance(error, errors.GatedRepoError):
        return f"{start}its owner asks for terms to be accepted first. Do so at {page}, and {_LOG_IN}."
    if status == 401 and (_sent_token(response) or not isinstance(error, errors.RepositoryNotFoundError)):
        return f"{start}{hub} does not accept your access token (HF_TOKEN, or that of `hf auth login`). {_RENEW}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{start}{hub} has this model, but no such branch, tag or commit of it; see {page}/commits/main."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{start}there is no such folder, and {hub} has no such model.{_perhaps(name)} Of a private model it says "
            f"the same: {_LOG_IN}."
        )
    if status == 403:
        return f"{start}your access token does not allow it (403). {_RENEW}"
    if status is not None:
        return f"{start}{hub} is down or busy (it answered {status}). Try again later.{_ELSEWHERE}"
    if isinstance(error, errors.OfflineModeIsEnabled) or is_offline_mode():
        return (
            f"{start}there is no such folder, it was not downloaded before, and HF_HUB_OFFLINE forbids to ask "
            f"{hub}.{_perhaps(name)} Unset it, or download the model on a machine that may.{_ELSEWHERE}"
        )
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"{start}its files cannot be written ({told(error)}). HF_HOME says where they go."
    return (
        f"{start}{hub} cannot be reached ({type(error).__name__}: {told(error)[:120]}). Check the network, the proxy "
        f"(HTTPS_PROXY), or name a mirror (HF_ENDPOINT).{_ELSEWHERE}"
    )


def _first_cause(error: BaseException) -> BaseException:
    """Under what the library says of its own cache, what the Hub or the network said."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "response", None) is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _sent_token(response: Any) -> bool:
    return "authorization" in getattr(getattr(response, "request", None), "headers", {})


def _perhaps(name: str) -> str:
    near = [known for known in near_names(name) if known != name]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


_LOG_IN = "set HF_TOKEN to an access token of your account (or run `hf auth login`)"
_RENEW = "Make a new one at https://huggingface.co/settings/tokens."
_ELSEWHERE = (
    " Offline, use --model nano (model='nano'), which comes with this package, or the path of a folder that holds the "
    "downloaded model (docs/models.md)."
)
