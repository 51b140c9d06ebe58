"""pyiqa: the score as ``pyiqa.create_metric("visualquality_r1")``, beside the metrics that pyiqa has already.

    import pyiqa
    from vqr1_metric.integrations.pyiqa import register

    register()
    metric = pyiqa.create_metric("visualquality_r1-nano", device="cuda")
    metric(images)                                     # (B, 3, H, W) in [0, 1], or a path -> (B, 1), in [1, 5]
    loss = -pyiqa.create_metric("visualquality_r1-nano", as_loss=True)(images)

pyiqa is no dependency of this package: ``pip install pyiqa`` brings its own torch requirements.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqr1_metric.images import load_image
from vqr1_metric.metric import visual_quality_r1_score
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

try:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.models.inference_model import InferenceModel
    from pyiqa.utils.registry import ARCH_REGISTRY
except ModuleNotFoundError as error:
    if error.name != "pyiqa":
        raise
    raise ModuleNotFoundError("vqr1_metric.integrations.pyiqa needs pyiqa: pip install pyiqa") from None

#: pyiqa's name -> the model it stands for.
NAMES = {"visualquality_r1": DEFAULT_MODEL, "visualquality_r1-nano": "nano"}


class VisualQualityR1(nn.Module):
    """pyiqa's view of a scorer.

    The judge's weights are not in ``parameters()``; they load at the first call, on the device this module is on.

    Args:
        model: Hugging Face Hub name, local folder, or ``"nano"``.
        options: of :class:`~vqr1_metric.scorer.QualityScorer` (``mode``, ``dtype``, ``max_pixels``, ...).
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options
        self._scorer = QualityScorer(model, **options)  # wrong options are refused now, not at the first picture
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # follows .to(device)

    @property
    def scorer(self) -> QualityScorer:
        """The scorer on this module's device (or where ``device`` or ``device_map`` put it)."""
        device = str(self.anchor.device)
        placed = {"device", "device_map"} & set(self.options)
        if not placed and self._scorer.spec.device != device:
            self._scorer = QualityScorer(self.model, device=device, **self.options)
        return self._scorer

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape ``(B, 1)``, higher is better; NaN for a picture that has no score.

        Args:
            x: ``(B, 1 or 3, H, W)`` in [0, 1]. As a loss, for which pyiqa checks no range, values beyond are clamped:
                a network in training overshoots.
        """
        as_loss = torch.is_grad_enabled()  # pyiqa switches gradients off otherwise
        pixels = x.clamp(0, 1) if as_loss else x
        differentiable = as_loss and x.requires_grad
        scores = visual_quality_r1_score(pixels, self.scorer, differentiable=differentiable, reduction="none")
        return scores.unsqueeze(1)


def register() -> list[str]:
    """Make the names known to pyiqa; calling it again changes nothing.

    Options go through pyiqa: ``pyiqa.create_metric("visualquality_r1", model=FOLDER, mode="think")``.

    Returns:
        The names for ``pyiqa.create_metric``, which ``pyiqa.list_models()`` lists from now on.
    """
    _read_files_as_everywhere()
    kind = VisualQualityR1.__name__
    if kind not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(VisualQualityR1)
    for name, model in NAMES.items():
        DEFAULT_CONFIGS.setdefault(
            name,
            {
                "metric_opts": {"type": kind, "model": model},
                "metric_mode": "NR",
                "lower_better": False,
                "score_range": "1, 5",
            },
        )
    return list(NAMES)


def _read_files_as_everywhere() -> None:
    """Let this package read the files that these two metrics get.

    pyiqa's own reader turns no picture by its EXIF, drops transparency and cuts 16 bits, so that a path would have
    another score than everywhere else. Other metrics of pyiqa are as they were.
    """
    prepare = InferenceModel._prepare_inputs
    if getattr(prepare, "_vqr1", False):
        return

    @functools.wraps(prepare)
    def prepared(self: InferenceModel, target: Any, ref: Any = None) -> Any:
        if self.metric_name in NAMES and not isinstance(target, Tensor):
            pixels = load_image(target)
            target = (pixels if pixels.is_floating_point() else pixels / 255).float().unsqueeze(0)
        return prepare(self, target, ref)

    cast("Any", prepared)._vqr1 = True
    InferenceModel._prepare_inputs = prepared
