"""`VisualQualityR1Score`, a torchmetrics metric. Its functional twin is in :mod:`~vqr1_metric.loss`."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from vqr1_metric._warnings import warn_caller
from vqr1_metric.functional.distribution import GRID_SIZE, MAX_SCORE, MIN_SCORE, ScoreDistribution
from vqr1_metric.functional.intervals import interval_of_moments
from vqr1_metric.functional.moments import combine_moments, moments_of, moments_state, read_moments
from vqr1_metric.images import DataRange, Images
from vqr1_metric.loss import (
    Reduction,
    checked_reduction,
    checked_scorer,
    failures,
    scores_of,
    visual_quality_r1_score,
)
from vqr1_metric.protocol import Mode
from vqr1_metric.results import ImageScore, pack_results, unpack_results
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

__all__ = ["VisualQualityR1Score", "visual_quality_r1_score"]

#: Fewer scores say too little of their spread for an interval that holds what it states.
MIN_SCORES_FOR_INTERVAL = 5
_PIXEL_OPTIONS = ("data_range", "clamp")
_SCORER_OPTIONS = frozenset(inspect.signature(QualityScorer).parameters) - {"model", "mode", *_PIXEL_OPTIONS}
_FINGERPRINT_BYTES = 8


class VisualQualityR1Score(Metric):
    r"""Mean picture quality on a scale of 1 (very poor) to 5 (excellent), without reference pictures.

    ``forward`` and ``update`` take whatever :meth:`QualityScorer.score <vqr1_metric.scorer.QualityScorer.score>` takes:
    a tensor ``(B, C, H, W)`` or ``(C, H, W)``, uint8 or floating in ``data_range``, on any device; paths, bytes, PIL
    pictures, arrays; or a list of these with any sizes. ``forward`` runs the model once and returns the value of its
    batch. ``compute`` returns a float32 tensor on the metric's device: with ``reduction="mean"`` the mean over all
    pictures of all processes, shape ``()``; with ``"none"`` every score, shape ``(N,)``, in the order of the updates,
    rank after rank. Before the first picture the mean is NaN, with a warning.

    A tensor of another range, dtype or shape raises before anything is scored. A picture that has no score (a damaged
    file, NaN pixels, an unreadable reply) is NaN: ``"none"`` returns it in its place, the mean leaves it out and warns,
    once between two resets, and ``num_failed`` counts it.

    The weights are no part of the metric. They load at the first update, belong to ``metric.scorer``, and are shared by
    every scorer of the process that asks for the same ones. With ``reduction="mean"`` the states are some numbers,
    however many pictures there are. docs/metric.md has collections, trackers, several processes, Lightning, ignite.

    Args:
        model: Hugging Face Hub name, local folder, or ``"nano"``, the embedded model.
        mode: ``"score"`` (one deterministic forward pass), ``"think"`` or ``"sample"``, see
            :class:`~vqr1_metric.scorer.QualityScorer`.
        scorer: a ready scorer, instead of ``model``, ``mode`` and the scorer's options.
        reduction: ``"mean"`` or ``"none"``.
        keep_details: keep the whole result of every picture (distribution, replies, reason of a failure; 2 kB each and
            the replies) for :meth:`details` and :meth:`distributions`.
        on_error: ``"nan"``, or ``"raise"`` to raise :class:`~vqr1_metric.images.ImageError` at the first picture that
            cannot be read, before anything of its update is scored or stored.
        data_range, clamp: what floating pixels mean, and whether values beyond are taken as black or white; see
            :class:`~vqr1_metric.scorer.QualityScorer`. None: as the scorer has them.
        confidence_level: of :meth:`confidence_interval`, in (0, 1).
        keep_distributions: of version 0.1.0, now ``keep_details``.
        kwargs: options of :class:`~vqr1_metric.scorer.QualityScorer` (``device``, ``dtype``, ``max_pixels``,
            ``batch_tokens``, ...) and of :class:`torchmetrics.Metric` (``sync_on_compute``, ...).

    Raises:
        ValueError: for an argument that cannot be; nothing is loaded before.

    Example:
        >>> metric = VisualQualityR1Score("nano")  # doctest: +SKIP
        >>> metric.update(torch.rand(4, 3, 256, 256))  # doctest: +SKIP
        >>> metric.compute()  # doctest: +SKIP
        tensor(1.8921)
    """

    is_differentiable = False  # states are detached; visual_quality_r1_score(..., differentiable=True) is the loss
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = MIN_SCORE
    plot_upper_bound = MAX_SCORE

    fingerprint: Tensor
    moments: Tensor
    failed: Tensor
    scores: list[Tensor]
    records: list[Tensor]

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        mode: Mode = "score",
        *,
        scorer: QualityScorer | None = None,
        reduction: Reduction | None = "mean",
        keep_details: bool = False,
        on_error: Literal["nan", "raise"] = "nan",
        data_range: DataRange | None = None,
        clamp: bool | None = None,
        confidence_level: float = 0.95,
        keep_distributions: bool | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in _SCORER_OPTIONS & set(kwargs)}
        # A rank without new pictures would return its cached value and let the others wait for it, forever.
        kwargs.setdefault("compute_with_cache", False)
        super().__init__(**kwargs)
        if on_error not in ("nan", "raise"):
            raise ValueError(f"Expected on_error to be 'nan' or 'raise', but got {on_error!r}.")
        if scorer is not None and (options or (model, mode) != (DEFAULT_MODEL, "score")):
            given = [name for name, yes in (("model", model != DEFAULT_MODEL), ("mode", mode != "score")) if yes]
            raise ValueError(f"Expected a scorer or {', '.join([*given, *sorted(options)])}, but got both.")
        if not 0 < confidence_level < 1:
            raise ValueError(f"Expected confidence_level in (0, 1), such as 0.95, but got {confidence_level!r}.")
        if keep_distributions is not None:
            warn_caller("keep_distributions of version 0.1.0 is now keep_details.")
            keep_details = keep_details or keep_distributions
        self.reduction = checked_reduction(reduction)
        self.keep_details = keep_details
        self.on_error = on_error
        self.confidence_level = confidence_level
        # A plain object, not a module: what torchmetrics and Lightning do to modules never reaches the weights.
        self.scorer = QualityScorer(model, mode, **options) if scorer is None else checked_scorer(scorer)
        if data_range is not None or clamp is not None:
            self.scorer = self.scorer.replace(data_range=data_range, clamp=clamp)
        self._warned = False
        self._in_forward = False
        self._scored: list[list[ImageScore]] = []  # by the updates of the forward that is running,
        self._again: list[list[ImageScore]] = []  # and what is left of it for its second round

        # The fingerprint comes first, so that another configuration is noticed before any other state is touched.
        self.add_state(
            "fingerprint", torch.zeros(_FINGERPRINT_BYTES, dtype=torch.int64), dist_reduce_fx=_same_fingerprint
        )
        if self.reduction == "mean":
            self.add_state("moments", moments_state([]), dist_reduce_fx=combine_moments)
            self.add_state("failed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        else:
            self.add_state("scores", [], dist_reduce_fx="cat")
        if keep_details:
            self.add_state("records", [], dist_reduce_fx="cat")

    @torch.inference_mode(False)  # tensors made in inference mode could never take part in a later loss
    @torch.no_grad()
    def update(self, images: Images | None = None, target: object = None, *, preds: Images | None = None) -> None:
        """Score pictures and store their scores.

        Args:
            images: see the class. Or results that ``metric.scorer`` has given already.
            target: ignored, so that one call of a ``MetricCollection`` can update this metric beside PSNR and SSIM.
            preds: another name of ``images``, the one that those metrics have.

        Raises:
            ImageContractError: for tensors and arrays of another form or range, or what is no picture.
            ImageError: for a bad picture, with ``on_error="raise"``.
        """
        images = preds if images is None else images
        if images is None:
            raise TypeError("Expected pictures, as update(images) or update(preds=images, target=...).")
        self._check_placement()
        results = self._results_of(images)
        fingerprint = self._own_fingerprint()
        self.fingerprint = _same_fingerprint(torch.stack([self.fingerprint, fingerprint]))
        scores = scores_of(results, self.device)
        failed = [result for result in results if result.error is not None]
        if self.reduction == "mean":
            added = moments_state([result.score for result in results if result.error is None])
            self.moments = combine_moments(torch.stack([self.moments, added.to(self.device)]))
            self.failed = self.failed + len(failed)
        else:
            self.scores.append(scores)
        if self.keep_details:
            self.records.append(torch.frombuffer(bytearray(pack_results(results)), dtype=torch.uint8).to(self.device))
        if failed and not self._warned:
            self._warned = True
            warn_caller(
                f"{failures(failed, len(results))} metric.num_failed counts all of them; keep_details=True keeps "
                "every reason. This is said once, until reset()."
            )

    def compute(self) -> Tensor:
        """The mean or all scores, as the class describes."""
        if self.reduction == "none":
            return self._scores()
        count, mean, _, _ = read_moments(self.moments)
        if count == 0 and self.update_called:
            warn_caller("Not one picture has a score, so the mean is NaN.")
        return torch.tensor(mean if count else math.nan, dtype=torch.float32, device=self.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value, with one model pass.

        torchmetrics' own, but that what was stored is kept if a picture raises.
        """
        before = {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        self._in_forward, self._scored, self._again = True, [], []
        try:
            value = super().forward(*args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise
        finally:
            self._in_forward, self._scored, self._again = False, [], []
        return value

    def reset(self) -> None:
        """Forget all pictures."""
        for name in self._list_states():  # new lists: torchmetrics.Running keeps the ones that its reset would clear
            setattr(self, name, [])
        super().reset()
        if self._in_forward:
            self._again = list(self._scored)  # with dist_sync_on_step it goes through the batch twice
        else:
            self._warned = False

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, for a process without pictures too."""
        for name, dtype in self._list_states().items():
            if not getattr(self, name):  # torchmetrics would send an empty tensor of the default dtype
                setattr(self, name, [torch.zeros(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same configuration stored, or its ``metric_state``.

        Raises:
            ValueError: if its scores came from another model or other settings; nothing is merged then.
        """
        if isinstance(incoming_state, VisualQualityR1Score):
            incoming_state = incoming_state.metric_state
        if not isinstance(incoming_state, dict):
            raise ValueError(f"Expected a {type(self).__name__} or its metric_state, but got {incoming_state!r}.")
        missing = [name for name in self.metric_state if name not in incoming_state]
        if missing:
            raise ValueError(f"Expected a state with {', '.join(missing)}; are reduction and keep_details the same?")
        _same_fingerprint(torch.stack([self.fingerprint, incoming_state["fingerprint"].to(self.device)]))
        for name, value in self.metric_state.items():
            other = incoming_state[name]
            if isinstance(value, list):
                rows = [other] if isinstance(other, Tensor) else other
                setattr(self, name, [*value, *(row.to(self.device) for row in rows)])
            else:
                both = torch.stack([value, other.to(self.device)])
                combine = {"fingerprint": _same_fingerprint, "moments": combine_moments}.get(name)
                setattr(self, name, both.sum(0) if combine is None else combine(both))
        self._update_count += 1  # torchmetrics' own merge_state leaves it, and compute() then warns of no update
        self._computed = None

    @property
    def num_failed(self) -> int:
        """Pictures without a score; of this process."""
        return int(self.failed if self.reduction == "mean" else self._scores().isnan().sum())

    def details(self) -> list[ImageScore]:
        """One result per picture, in order: score, std, coverage, replies, and the reason where there is no score.

        Pictures of this process, since the last reset, and those of merged and loaded states.

        Raises:
            RuntimeError: without ``keep_details=True``.
        """
        self._need_details()
        records = self.records if isinstance(self.records, list) else [self.records]  # one tensor when synced
        return [result for record in records for result in unpack_results(record.cpu().numpy().tobytes())]

    @torch.inference_mode(False)
    @torch.no_grad()
    def distributions(self) -> ScoreDistribution:
        """Score distributions of the pictures, leading shape ``(N,)``, in order; without a score, a row of NaN.

        Of all processes, as ``compute``: every process must call it. On the metric's device.

        Raises:
            RuntimeError: without ``keep_details=True``.
        """
        self._need_details()
        with self._synced():
            results = self.details()
        if not results:
            return ScoreDistribution(torch.zeros(0, GRID_SIZE, device=self.device))
        return ScoreDistribution.stack([r.distribution.to(self.device, torch.float32) for r in results])

    @torch.inference_mode(False)
    @torch.no_grad()
    def confidence_interval(
        self, level: float | None = None, num_bootstraps: int | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Interval of the mean score, see :func:`~vqr1_metric.functional.intervals.mean_interval`.

        It says how much the mean would change with other pictures of the same kind, not how good the model is. In a
        distributed run it covers all processes, as ``compute``, and every process must call it.

        Args:
            level: in (0, 1); by default the metric's ``confidence_level``.
            num_bootstraps, seed: of version 0.1.0, which resampled; without effect.

        Returns:
            ``(low, high)``, each of shape ``()``, float32; NaN with a warning for fewer than five scores.
        """
        level = self.confidence_level if level is None else level
        if not 0 < level < 1:
            raise ValueError(f"Expected a confidence level in (0, 1), such as 0.95, but got {level!r}.")
        with self._synced():
            state = self.moments if self.reduction == "mean" else moments_state(self._scores().tolist())
        count, mean, spread, third = moments_of(state)
        if count < MIN_SCORES_FOR_INTERVAL:
            warn_caller(
                f"An interval of the mean needs at least {MIN_SCORES_FOR_INTERVAL} scores, but there are {count}: it "
                "is NaN."
            )
            ends = (math.nan, math.nan)
        else:
            ends = interval_of_moments(count, mean, spread, third, level)
        low, high = (torch.tensor(end, dtype=torch.float32, device=self.device) for end in ends)
        return low, high

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or several (of ``forward`` or ``compute``; by default ``compute()``) on the scale 1..5.

        Needs matplotlib: ``pip install 'vqr1-metric[plot]'``. Returns the figure and the axes.
        """
        return self._plot(val, ax)  # what every metric of torchmetrics calls here

    def offload(self) -> None:
        """Move the weights to the CPU; the next update brings them back. Affects all scorers that share them."""
        self.scorer.offload()

    def unload(self) -> None:
        """Drop the weights, for all scorers that share them; the next update loads them again. Scores stay."""
        self.scorer.unload()

    def set_dtype(self, dst_type: str | torch.dtype) -> VisualQualityR1Score:
        """Change nothing: scores are float32."""
        return self

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"{self.scorer!r}, reduction={self.reduction!r}"

    def _results_of(self, images: Images) -> list[ImageScore]:
        """Score pictures; those that this forward has scored already are not scored again."""
        if isinstance(images, (list, tuple)) and images and all(isinstance(image, ImageScore) for image in images):
            return list(images)
        if self._again:
            return self._again.pop(0)
        results = self.scorer.score(images, on_error=self.on_error)
        if self._in_forward:
            self._scored.append(results)
        return results

    def _own_fingerprint(self) -> Tensor:
        """What must agree for scores to be averaged, and for metrics of a collection to share a pass: never zeros."""
        recipe = [self.scorer.identity(), self.on_error, f"{type(self).__module__}.{type(self).__qualname__}"]
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).digest()[:_FINGERPRINT_BYTES]
        # Bytes and not one number, because compute groups compare states with a relative tolerance.
        return torch.tensor(list(digest), device=self.device)

    def _scores(self) -> Tensor:
        scores = self.scores if isinstance(self.scores, list) else [self.scores]  # one tensor when synced
        return torch.cat(scores) if scores else torch.zeros(0, device=self.device)

    def _list_states(self) -> dict[str, torch.dtype]:
        states = {} if self.reduction == "mean" else {"scores": torch.float32}
        return states | ({"records": torch.uint8} if self.keep_details else {})

    def _check_placement(self) -> None:
        """NCCL gathers from GPUs only: say so at the first picture and not when the epoch is over."""
        if self.device.type != "cpu" or not self.sync_on_compute or not torch.distributed.is_available():
            return
        if torch.distributed.is_initialized() and torch.distributed.get_backend(self.process_group) == "nccl":
            raise RuntimeError(
                "This process group uses NCCL, which gathers from GPUs only, but the metric's states are on the CPU: "
                "call metric.to(device) with this process's GPU once. It moves some numbers, never the judge."
            )

    def _need_details(self) -> None:
        if not self.keep_details:
            raise RuntimeError(
                "Details are not kept: make the metric with keep_details=True. scorer.score has them too."
            )

    def _synced(self) -> AbstractContextManager[None]:
        """The states of all processes, as in ``compute``; the body must not raise."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute)

    # ------------------------------------- private names of torchmetrics and torch, each for want of a public one

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> VisualQualityR1Score:
        # Follow to another device, not to another dtype: `module.to(torch.float16)` would round the scores.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, exclude_state)
        return self

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # torchmetrics clones the value, which must be usable in a loss, and makes a scalar of a single score.
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            with torch.inference_mode(False):
                value: Tensor = wrapped(*args, **kwargs)
            return value if self.reduction == "mean" else value.reshape(-1)

        return computed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The hook of nn.Module where what is loaded can be refused before anything changes.
        stored = state_dict.get(f"{prefix}fingerprint")
        if stored is not None and bool(stored.any()):
            _same_fingerprint(torch.stack([self._own_fingerprint(), stored.to(self.device)]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _same_fingerprint(fingerprints: Tensor) -> Tensor:
    """Reduce fingerprints, ``(n, bytes)``, to the one they must all be; zeros, without pictures, agree with any."""
    known = fingerprints[fingerprints.any(1)]
    if len(known) == 0:
        return fingerprints[0]
    if bool((known != known[0]).any()):
        raise ValueError(
            "Expected scores of one model with the same settings in every metric state and on every rank, but got "
            "different ones: they must not be averaged. Compare model, revision, dtype, mode, pixel limits, "
            "data_range, clamp and on_error."
        )
    return known[0]
