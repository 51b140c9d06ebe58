"""What happens beside the steps: a run that is broken or learns nothing ends, signals are heard, replies written down.

Every complaint is a :class:`~vqr1_metric.train_ranker.checks.TrainingError`, raised on the process that sees it; the
launcher then ends the others. Figures are means over all processes, so most see it together.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from vqr1_metric.ratings import RatedImage
from vqr1_metric.train_ranker.checks import TrainingError
from vqr1_metric.train_ranker.config import RankerConfig

#: A smaller readable share of the replies is as good as none.
_NOTHING_READABLE = 1e-6


class Guard(TrainerCallback):
    """Ends a run with a reason where gradients, losses or weights are not finite, or nothing is learnt.

    Args:
        config: the settings; those called ``collapse_...``, ``unreadable_patience`` and ``validation_drop`` count.
    """

    def __init__(self, config: RankerConfig) -> None:
        self.config = config
        self.start: float | None = None
        self.best = -math.inf
        self.low = self.unreadable = self.logs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The best so far, of a resumed run."""
        self.best = -math.inf if state.best_metric is None else state.best_metric

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Gradients, before they reach the weights."""
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if gradients and not all_finite(gradients):
            raise TrainingError(
                f"the gradient of step {state.global_step + 1} is not finite, so the weights were left as they are. "
                f"Try a lower learning_rate ({self.config.learning_rate:g} here) or dtype='float32'."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Losses, readable replies and the spread of the scores."""
        logs = logs or {}
        for name in ("loss", "grad_norm", "kl"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"{name} is {logs[name]} in step {state.global_step}: the run is broken. Try a lower learning_rate "
                    f"({self.config.learning_rate:g} here)."
                )
        if "readable" in logs:
            self.logs += 1
            self.unreadable = self.unreadable + 1 if not logs["readable"] > _NOTHING_READABLE else 0
            if self.config.unreadable_patience and self.unreadable >= self.config.unreadable_patience:
                self._nothing_readable(state.global_step)
        spread = logs.get("spread", math.nan)
        if not math.isnan(spread):
            self.low = self.low + 1 if spread < self.config.collapse_spread else 0
            if self.config.collapse_patience and self.low >= self.config.collapse_patience:
                raise TrainingError(
                    f"stopped at step {state.global_step}: in the last {self.low} logs the mean scores of different "
                    f"pictures differed by less than {self.config.collapse_spread:g} (last {spread:.4f}), so the model "
                    "says the same of every picture, which earns .708 and teaches nothing. Try: a start model whose "
                    "scores already follow the pictures, a lower learning_rate, more pictures in a comparison set, a "
                    "higher kl_weight; or raise collapse_patience if the scores were still spreading."
                )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """A checkpoint of every best validation; an end where it has fallen far below the start."""
        figure = main_figure(metrics or {}, "eval_")
        if figure is None:
            return
        drop = self.config.validation_drop
        fallen = math.isnan(figure) or (self.start is not None and figure < self.start - drop)
        if drop and self.start is not None and not math.isnan(self.start) and fallen:
            raise TrainingError(
                f"stopped at step {state.global_step}: validation fell to {figure:.3f} from {self.start:.3f} at the "
                f"start, by more than validation_drop ({drop:g}). Try a lower learning_rate "
                f"({self.config.learning_rate:g} here) or a higher kl_weight."
            )
        if figure > self.best and state.global_step and state.global_step % self.config.num_iterations == 0:
            self.best = figure
            control.should_save = control.should_save or self.config.keep_best

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that ends unreadable before its patience does: in its last three logs, or in all of fewer."""
        if self.config.unreadable_patience and self.logs and self.unreadable >= min(3, self.logs):
            self._nothing_readable(state.global_step)

    def _nothing_readable(self, step: int) -> None:
        raise TrainingError(
            f"stopped at step {step}: no reply held a score that could be read in the last {self.unreadable} logs, so "
            "nothing was learnt. Try: a larger max_new_tokens if replies are cut off, cold_start_steps for a model "
            "that does not know the form, another start model; replies.jsonl shows what was said."
        )


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Are all values of all tensors finite? Of a weight that ZeRO-3 divides, this process's part."""
    parts = [getattr(tensor, "ds_tensor", tensor) for tensor in tensors]
    floating = [part.detach() for part in parts if part.is_floating_point() and part.numel()]
    if not floating:
        return True
    norms = torch._foreach_norm(floating, math.inf)
    return bool(torch.isfinite(torch.stack([norm.float().to(norms[0].device) for norm in norms])).all())


def main_figure(metrics: Mapping[str, float], prefix: str = "") -> float | None:
    """The validation figure that decides what is best: the mean SRCC of all sets, of preferences alone their pairs."""
    found = (metrics.get(f"{prefix}{name}") for name in ("srcc", "pairs"))
    return next((value for value in found if value is not None), None)


class Checkpoints(TrainerCallback):
    """A checkpoint's model card and manifest, once all processes have written their part of it.

    Args:
        finish: called on every process with the folder.
    """

    def __init__(self, finish: Callable[[Path], None]) -> None:
        self.finish = finish

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each checkpoint."""
        self.finish(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class SignalStop(TrainerCallback, AbstractContextManager["SignalStop"]):
    """Inside of it SIGTERM and SIGINT end training after the current step, with a checkpoint; a second one at once.

    Args:
        any_process: says of each process's flag whether one is set.
        period: steps after which a checkpoint may be written (updates for each batch of replies).
    """

    def __init__(self, any_process: Callable[[bool], bool], period: int = 1) -> None:
        self.any_process, self.period = any_process, period
        self.received: int | None = None
        self.stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalStop:
        try:
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: signals are somebody else's
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt("interrupted twice: ended without another checkpoint")
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every process asks in every step, so that all end after the same one."""
        if self.any_process(self.received is not None) and state.global_step % self.period == 0:
            self.stopped = control.should_save = control.should_training_stop = True


class RepliesLog:
    """Appends the replies of one comparison set to ``replies.jsonl``, every so many steps.

    Args:
        folder: where the file is.
        pictures: what the picture indices mean.
        replies: how many of the first replies to write.
        every: steps between two entries.
    """

    def __init__(self, folder: Path, pictures: list[RatedImage], replies: int, every: int) -> None:
        self.path = Path(folder) / "replies.jsonl"
        self.pictures, self.replies, self.every = pictures, replies, every

    def __call__(self, step: int, rows: list[dict[str, Any]]) -> None:
        if step % self.every:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows[: self.replies]:
                picture = self.pictures[int(row["picture"])]
                told = {"step": step, **row, "picture": picture.name}
                # JSON has no NaN: an unreadable reply has no score and no reward.
                told = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in told.items()}
                file.write(json.dumps(told) + "\n")
