"""`VisualQualityR1Score`, a torchmetrics metric, and its functional twin `visual_quality_r1_score`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from vqr1_metric.functional.bootstrap import bootstrap_mean_interval
from vqr1_metric.functional.distribution import GRID_SIZE, MAX_SCORE, MIN_SCORE, ScoreDistribution
from vqr1_metric.images import ImageLike, split_images
from vqr1_metric.protocol import Mode
from vqr1_metric.results import ImageScore
from vqr1_metric.scorer import DEFAULT_MODEL, QualityScorer

Reduction = Literal["mean", "none"]

_SCORER_OPTIONS = frozenset(inspect.signature(QualityScorer).parameters) - {"model", "mode"}
_FINGERPRINT_BYTES = 6


class VisualQualityR1Score(Metric):
    r"""Mean picture quality on a scale of 1 (very poor) to 5 (excellent), without reference pictures.

    ``forward`` and ``update`` take pictures: a tensor ``(B, C, H, W)`` or ``(C, H, W)``, uint8 or floating in [0, 1],
    on any device; a path, bytes, a PIL picture, an array; or a list of these with any sizes. ``forward`` runs the model
    once and returns the value of its batch. ``compute`` returns a float32 tensor on the metric's device: with
    ``reduction="mean"`` the mean over all pictures of all processes, shape ``()``; with ``"none"`` every score, shape
    ``(N,)``, in the order of the updates, rank after rank. Before the first picture the mean is NaN, with a warning.

    A picture that has no score (a damaged file, an unreadable reply) is NaN: ``"none"`` returns it in its place, the
    mean leaves it out and warns once, ``num_failed`` counts it and :meth:`details` has the reason.

    The weights are no part of the metric. They load at the first update, belong to ``metric.scorer``, and are shared by
    every scorer of the process that asks for the same ones: they are neither in ``parameters()`` nor in
    ``state_dict()``, and clones, copies, pickles, ``BootStrapper`` and ``MetricTracker`` do not copy them. So

    - ``metric.to(device)`` moves the stored scores (some bytes), never the model, which ``device=`` places;
    - ``half()``, ``to(dtype)`` and ``set_dtype`` change nothing: scores stay float32, and ``dtype=`` is the model's;
    - ``train()``, autocast and inference mode change nothing;
    - ``offload()`` moves the weights to the CPU between evaluations and ``unload()`` drops them.

    Two metrics of a ``MetricCollection`` share one model pass only if their scorers would give the same scores.

    Args:
        model: Hugging Face Hub name, local folder, or ``"nano"``, the embedded model.
        mode: ``"score"`` (one deterministic forward pass), ``"think"`` or ``"sample"``, see
            :class:`~vqr1_metric.scorer.QualityScorer`.
        scorer: a ready scorer, instead of ``model``, ``mode`` and the scorer's options.
        reduction: ``"mean"`` or ``"none"``.
        keep_distributions: keep the whole distribution of every picture as a synchronised state, 1.6 kB each, so that
            :meth:`distributions` covers all processes.
        on_error: ``"nan"``, or ``"raise"`` to raise :class:`~vqr1_metric.images.ImageError` at the first picture that
            cannot be read, before anything of its update is scored or stored.
        confidence_level: of :meth:`confidence_interval`, in (0, 1).
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

    scores: list[Tensor]
    fingerprint: Tensor

    #: Shape of one picture's row in every list state.
    _rows_shape: ClassVar[dict[str, tuple[int, ...]]] = {
        "scores": (),
        "probabilities": (GRID_SIZE,),
        "coverage": (),
        "tag_probability": (),
    }

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        mode: Mode = "score",
        *,
        scorer: QualityScorer | None = None,
        reduction: Reduction | None = "mean",
        keep_distributions: bool = False,
        on_error: Literal["nan", "raise"] = "nan",
        confidence_level: float = 0.95,
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
        self.reduction = _checked_reduction(reduction)
        self.keep_distributions = keep_distributions
        self.on_error = on_error
        if not 0 < confidence_level < 1:
            raise ValueError(f"Expected confidence_level in (0, 1), such as 0.95, but got {confidence_level!r}.")
        self.confidence_level = confidence_level
        # A plain object, not a module: what torchmetrics and Lightning do to modules never reaches the weights.
        self.scorer = QualityScorer(model, mode, **options) if scorer is None else _checked_scorer(scorer)
        self._results: list[ImageScore] = []
        self._warned = False
        # First, so that another configuration is noticed before any other state is touched. Bytes and not one number,
        # because compute groups compare states with a relative tolerance.
        digits = list(self.scorer.fingerprint.to_bytes(_FINGERPRINT_BYTES, "big"))
        self.add_state("fingerprint", torch.tensor(digits), dist_reduce_fx=_same_configuration)
        for name in self._rows_shape if keep_distributions else ["scores"]:
            self.add_state(name, [], dist_reduce_fx="cat")

    @torch.inference_mode(False)  # tensors made in inference mode could never take part in a later loss
    @torch.no_grad()
    def update(self, images: ImageLike | Sequence[ImageLike]) -> None:
        """Score pictures and store their scores; see the class for what they may be."""
        results = self.scorer.score(images, on_error=self.on_error)
        self.scores.append(_scores_of(results, self.device))
        if self.keep_distributions:
            distributions = _stacked(results).to(self.device)
            for name in ("probabilities", "coverage", "tag_probability"):
                getattr(self, name).append(getattr(distributions, name))
        self._results.extend(results)
        failed = [result for result in results if result.error is not None]
        if failed and not self._warned:
            self._warned = True
            _warn(
                f"{len(failed)} of {len(results)} pictures have no score and are left out of the mean: "
                f"{_reason(failed[0])}{', ...' if len(failed) > 1 else ''}. metric.num_failed counts all of them, "
                "metric.details() gives the reasons. This is said once."
            )

    def compute(self) -> Tensor:
        """The mean or all scores, as the class describes."""
        return _reduce(self._rows("scores"), self.reduction, warn_if_empty=self.update_called)

    def forward(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Add a batch and return its own value, with one model pass.

        Not torchmetrics' own ``forward``, because that loses what was stored if a picture raises, runs the model twice
        with ``dist_sync_on_step=True``, and copies every stored tensor at every step.
        """
        if self._is_synced:
            raise TorchMetricsUserError("The metric is synced; call `unsync` before `forward`.")
        names = [name for name, default in self._defaults.items() if isinstance(default, list)]
        for name in names:  # a list of its own: the members of a compute group share theirs
            setattr(self, name, list(getattr(self, name)))
        self.update(images)
        everything = {name: getattr(self, name) for name in names}
        try:
            for name in names:
                setattr(self, name, everything[name][-1:])
            self._to_sync = self.dist_sync_on_step
            self._forward_cache = self.compute()
        finally:
            for name in names:
                setattr(self, name, everything[name])
            self._to_sync, self._computed = self.sync_on_compute, None
        return self._forward_cache

    def reset(self) -> None:
        """Forget all pictures."""
        for name, default in self._defaults.items():
            if isinstance(default, list):  # new lists: torchmetrics.Running keeps the ones that its reset would clear
                setattr(self, name, [])
        self._results = []
        super().reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Append what another metric of the same configuration stored, or its ``metric_state``.

        Raises:
            ValueError: if its scores came from another model or other settings; nothing is merged then.
        """
        if isinstance(incoming_state, VisualQualityR1Score):
            results, incoming_state = incoming_state._results, incoming_state.metric_state
        elif isinstance(incoming_state, dict):
            results = []
        else:
            raise ValueError(f"Expected a {type(self).__name__} or its metric_state, but got {incoming_state!r}.")
        missing = [name for name in self._defaults if name not in incoming_state]
        if missing:
            raise ValueError(f"Expected a state with {', '.join(missing)}; is keep_distributions the same?")
        _same_configuration(torch.stack([self.fingerprint, incoming_state["fingerprint"].to(self.device)]))
        for name in set(self._defaults) - {"fingerprint"}:
            rows = incoming_state[name]
            rows = [row.to(self.device) for row in ([rows] if isinstance(rows, Tensor) else rows)]
            setattr(self, name, [*getattr(self, name), *rows])
        self._results = [*self._results, *results]
        self._update_count += 1
        self._computed = None

    @property
    def num_failed(self) -> int:
        """Pictures without a score; of this process."""
        return int(torch.isnan(self._local_scores()).sum())

    def details(self) -> list[ImageScore]:
        """One result per picture, in order: score, std, coverage, replies, and the reason where there is no score.

        Pictures of this process only, since the last reset; held on the CPU, about 4 kB each.

        Raises:
            RuntimeError: if scores are stored here that another metric computed, so that details would be missing.
        """
        stored = len(self._local_scores())
        if stored != len(self._results):
            raise RuntimeError(
                f"Expected details of {stored} pictures, but this metric has those of {len(self._results)}: the other "
                "scores came from a merged or loaded state, or from another metric of its compute group (ask the first "
                "of its group in collection.compute_groups, or use compute_groups=False)."
            )
        return list(self._results)

    @torch.inference_mode(False)
    @torch.no_grad()
    def distributions(self) -> ScoreDistribution:
        """Score distributions of the pictures, leading shape ``(N,)``, in order; without a score, a row of NaN.

        With ``keep_distributions=True`` those of all processes, as ``compute`` (every process must call it), on the
        metric's device; otherwise those of this process, on the CPU.
        """
        if not self.keep_distributions:
            return _stacked(self.details())
        with self._synced():
            rows = {name: self._rows(name) for name in ("probabilities", "coverage", "tag_probability")}
        return ScoreDistribution(**rows)

    @torch.inference_mode(False)
    @torch.no_grad()
    def confidence_interval(
        self, level: float | None = None, num_bootstraps: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Interval of the mean score, by resampling the stored scores: the model does not run again.

        It says how much the mean would change with other pictures of the same kind, not how good the model is. In a
        distributed run it covers all processes, as ``compute``, and every process must call it.

        Args:
            level: in (0, 1); by default the metric's ``confidence_level``.
            num_bootstraps: resamples, at least 1.
            seed: the same seed and scores give the same interval.

        Returns:
            ``(low, high)``, each of shape ``()``, float32; NaN with a warning for fewer than two scores.
        """
        with self._synced():
            scores = self._rows("scores")
        scores = scores[~scores.isnan()]
        if len(scores) < 2:
            _warn(f"An interval of the mean needs at least two scores, but there are {len(scores)}: it is NaN.")
        level = self.confidence_level if level is None else level
        return bootstrap_mean_interval(scores, level, num_bootstraps, seed)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or several (of ``forward`` or ``compute``; by default ``compute()``) on the scale 1..5.

        Needs matplotlib: ``pip install 'vqr1-metric[plot]'``. Returns the figure and the axes.
        """
        return self._plot(val, ax)

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

    # ---------------------------------------------------------------- how torchmetrics treats the states

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> VisualQualityR1Score:
        # Follow to another device, not to another dtype: `module.to(torch.float16)` would round the scores.
        device = fn(torch.zeros(1, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        for name in set(self._defaults) & set(self._rows_shape):
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                # torchmetrics would send a one-dimensional tensor, which cannot meet the (N, 401) of other ranks.
                setattr(self, name, [torch.zeros(0, *self._rows_shape[name], device=self.device)])
        super()._sync_dist(*args, **kwargs)

    def _wrap_compute(self, compute: Callable) -> Callable:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            with torch.inference_mode(False):  # torchmetrics clones the value, which must be usable in a loss
                value = wrapped(*args, **kwargs)
            return value if self.reduction == "mean" else value.reshape(-1)  # it squeezes a single score, too

        return computed

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}fingerprint")
        if stored is not None:
            _same_configuration(torch.stack([self.fingerprint, stored.to(self.device)]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """The states of all processes, as in ``compute``; the body must not raise."""
        fresh = not self._is_synced
        should_sync = self.sync_on_compute and fresh
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=should_sync, should_unsync=fresh):
            yield

    def _rows(self, name: str) -> Tensor:
        return self._concatenated(getattr(self, name), name)

    def _local_scores(self) -> Tensor:
        return self._concatenated(self._cache["scores"] if self._is_synced else self.scores, "scores")

    def _concatenated(self, state: list[Tensor] | Tensor, name: str) -> Tensor:
        if isinstance(state, list) and not state:
            return torch.zeros(0, *self._rows_shape[name], device=self.device)
        return dim_zero_cat(state)


def visual_quality_r1_score(
    images: ImageLike | Sequence[ImageLike],
    scorer: QualityScorer,
    differentiable: bool = False,
    reduction: Reduction | None = "mean",
    *,
    on_error: Literal["nan", "raise"] = "nan",
) -> Tensor:
    """Quality of pictures on a scale of 1 to 5, as :class:`VisualQualityR1Score` computes it.

    Args:
        images: as for :class:`VisualQualityR1Score`.
        scorer: the model and how to use it; keep one and pass it to every call.
        differentiable: return expected scores with gradients to floating pixels, for a loss or reward to be
            *maximised* (``loss = -visual_quality_r1_score(...)``). The judge's weights are frozen and get no ``.grad``;
            under ``torch.no_grad()`` there is no graph. Needs a scorer with ``mode="score"``. A bad picture raises,
            since NaN would ruin the weights in training.
        reduction: ``"mean"`` over the pictures that have a score, or ``"none"``.
        on_error: ``"nan"`` or ``"raise"``, for a picture that cannot be read.

    Returns:
        Tensor of shape ``()``, or ``(B,)`` for ``"none"``, in [1, 5] or NaN; on the device of the first picture that is
        a tensor, otherwise on the CPU; float32 (float64 if differentiable and the model is float64).

    Raises:
        ImageError: for a bad or missing picture, if ``differentiable`` or ``on_error="raise"``.
    """
    reduction, scorer = _checked_reduction(reduction), _checked_scorer(scorer)
    images = split_images(images)
    device = next((image.device for image in images if isinstance(image, Tensor)), torch.device("cpu"))
    if not differentiable:
        with torch.inference_mode(False), torch.no_grad():
            return _reduce(_scores_of(scorer.score(images, on_error=on_error), device), reduction)
    if scorer.mode != "score":
        raise ValueError(f"Expected a scorer with mode='score' for differentiable=True, but got mode={scorer.mode!r}.")
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        return _reduce(scorer.distributions(images, differentiable=grad).mean.to(device), reduction)


def _reduce(scores: Tensor, reduction: Reduction, warn_if_empty: bool = True) -> Tensor:
    """All scores, or the mean of those that are not NaN; NaN where there is none."""
    if reduction == "none":
        return scores
    there = scores[~scores.isnan()]
    if len(there) == 0:
        if warn_if_empty:
            _warn("Not one picture has a score, so the mean is NaN.")
        return scores.new_tensor(torch.nan)
    return there.mean()


def _scores_of(results: Sequence[ImageScore], device: torch.device) -> Tensor:
    return torch.tensor([result.score for result in results], dtype=torch.float32, device=device)


def _stacked(results: Sequence[ImageScore]) -> ScoreDistribution:
    if not results:
        return ScoreDistribution(torch.zeros(0, GRID_SIZE))
    return ScoreDistribution.stack([result.distribution.to("cpu", torch.float32) for result in results])


def _same_configuration(fingerprints: Tensor) -> Tensor:
    """Reduce fingerprints, shape ``(n, bytes)``, to the one they must all be."""
    if bool((fingerprints != fingerprints[0]).any()):
        raise ValueError(
            "Expected scores of one model with the same settings in every metric state and on every rank, but got "
            "different ones: they must not be averaged. Compare model, revision, dtype, mode and pixel limits."
        )
    return fingerprints[0]


def _reason(result: ImageScore) -> str:
    error = result.error or ""
    return error if error.startswith(result.name) else f"{result.name}: {error}"


def _checked_reduction(reduction: str | None) -> Reduction:
    if reduction not in ("mean", "none", None):
        raise ValueError(f"Expected reduction to be 'mean' or 'none', but got {reduction!r}.")
    return reduction or "none"


def _checked_scorer(scorer: QualityScorer) -> QualityScorer:
    if not isinstance(scorer, QualityScorer):
        raise ValueError(f"Expected a QualityScorer, such as QualityScorer('nano'), but got {scorer!r}.")
    return scorer


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
