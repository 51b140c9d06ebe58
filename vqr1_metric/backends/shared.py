"""One copy of a model's weights for all scorers of a process that ask for the same content."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.files import CONTENT, ModelFiles
from vqr1_metric.backends.spec import ModelSpec

if TYPE_CHECKING:
    from vqr1_metric.backends.transformers import TransformersBackend


def model_identity(spec: ModelSpec, files: ModelFiles) -> dict[str, object]:
    """All that decides the scores of a model loaded by ``spec``, by content and as resolved; loads no weights."""
    return {
        **files.content(),
        "dtype": str(spec.resolved_dtype(files.weight_bytes())).removeprefix("torch."),
        "quantization": spec.quantization,
        "attention": spec.attn_implementation or "sdpa",
    }


class SharedModel:
    """One model with one content, whose weights all scorers of a process share that ask for it.

    ``identity``, ``revision`` and ``pixel_config`` are known before the weights load. They never change: a folder that
    was overwritten gives another object, and this one then refuses to load.
    """

    def __init__(self, spec: ModelSpec, files: ModelFiles, identity: dict[str, object]) -> None:
        self.spec, self.identity = spec, identity
        self.revision = revision_of(files, identity)
        self.pixel_config = files.pixel_config()
        self.backend: TransformersBackend | None = None

    def load(self, build: Callable[[ModelSpec], TransformersBackend]) -> TransformersBackend:
        """The model, built by ``build(spec)`` at the first call.

        Raises:
            ModelError: if the files are no longer those that this object stands for.
        """
        with _lock:
            if self.backend is None:
                self._check_unchanged()
                backend = build(self.spec)
                self._check_unchanged()  # loading takes a while
                self.backend = backend
            return self.backend

    def _check_unchanged(self) -> None:
        if model_identity(self.spec, ModelFiles.of(self.spec)) != self.identity:
            raise ModelError(
                f"{self.spec.model}: the files of this model have changed since this scorer was first used, and scores "
                "of both must not be mixed. Make a new QualityScorer for the new ones."
            )


def revision_of(files: ModelFiles, identity: dict[str, object]) -> str:
    """The Hub commit, or a hash of all that a local folder and its adapter's base hold."""
    if files.commit is not None:
        return files.commit
    content = json.dumps({name: identity[name] for name in CONTENT})
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


_newest: dict[ModelSpec, SharedModel] = {}
_lock = threading.RLock()


def shared(spec: ModelSpec) -> SharedModel:
    """The model that ``spec`` means now. Loads no weights."""
    with _lock:
        files = ModelFiles.of(spec)
        identity = model_identity(spec, files)
        model = _newest.get(spec)
        if model is None or model.identity != identity:
            model = _newest[spec] = SharedModel(spec, files, identity)
        return model


def cached(spec: ModelSpec, build: Callable[[ModelSpec], TransformersBackend]) -> TransformersBackend:
    """The backend of this spec, built by ``build(spec)`` at the first call."""
    return shared(spec).load(build)


def newest(spec: ModelSpec) -> SharedModel | None:
    """What :func:`shared` returned last, without a look at the files."""
    return _newest.get(spec)


def forget(spec: ModelSpec) -> None:
    """Drop the weights of this spec; the next use loads them again."""
    with _lock:
        model = _newest.pop(spec, None)
        if model is not None:
            model.backend = None
