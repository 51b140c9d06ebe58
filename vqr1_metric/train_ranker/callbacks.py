"""What happens beside the steps: replies are written down, a collapsed run is stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import TrainerCallback

from vqr1_metric.train_ranker.ratings import RatedPicture


class CollapseStop(TrainerCallback):
    """Stop when the model has come to say the same of every picture.

    Identical scores earn a fidelity of .708 whatever the pictures are, a plateau that training hardly leaves by itself.

    Args:
        spread: the standard deviation of the pictures' mean scores, in score units, below which it counts as collapsed.
        patience: so many logs in a row; 0 never stops.
    """

    def __init__(self, spread: float, patience: int) -> None:
        self.spread, self.patience, self.low = spread, patience, 0
        self.message: str | None = None

    def on_log(self, args, state, control, logs=None, **_):
        spread = (logs or {}).get("spread")
        if spread is None or math.isnan(spread):
            return
        self.low = self.low + 1 if spread < self.spread else 0
        if self.patience and self.low >= self.patience:
            control.should_training_stop = True
            self.message = (
                f"Training was stopped at step {state.global_step}: in the last {self.low} logs the mean scores of "
                f"different pictures differed by less than {self.spread:g} (last {spread:.4f}), so the model says the "
                "same of every picture, which earns .708 and teaches nothing. Try: a start model whose scores already "
                "follow the pictures, a lower learning_rate, more pictures in a comparison set, a higher kl_weight; or "
                "raise collapse_patience if the scores were still spreading."
            )


class RepliesLog:
    """Appends the replies of one comparison set to ``replies.jsonl``, every so many steps.

    Args:
        folder: where the file is.
        pictures: what the picture indices mean.
        replies: how many of the first replies to write.
        every: steps between two entries.
    """

    def __init__(self, folder: Path, pictures: list[RatedPicture], replies: int, every: int) -> None:
        self.path = Path(folder) / "replies.jsonl"
        self.pictures, self.replies, self.every = pictures, replies, every

    def __call__(self, step: int, rows: list[dict]) -> None:
        if step % self.every:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows[: self.replies]:
                picture = self.pictures[int(row["picture"])]
                told = {"step": step, **row, "picture": picture.name}
                # JSON has no NaN: an unreadable reply has no score and no reward.
                told = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in told.items()}
                file.write(json.dumps(told) + "\n")
