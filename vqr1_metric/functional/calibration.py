"""A model's temperature: how much wider its distributions must be for their intervals to hold what they say.

The score stays what it is. Only intervals change, and they become statements about people's opinions: of so many rated
images like those it was fitted on, 95% of the mean opinions lie inside the 95% interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vqr1_metric.functional.distribution import ScoreDistribution

#: Name of the file beside a model's weights.
FILE = "calibration.json"
#: Share of the mass that is spread evenly first: a score of probability 0 would keep it at any temperature.
FLOOR = 1e-12


def temper(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities to the power of ``1 / temperature``, normalised; shape ``(..., N)``, rows of NaN stay.

    Args:
        probabilities: of N answers.
        temperature: above 0; above 1 is wider, below 1 is narrower.
    """
    spread = probabilities.double() * (1 - FLOOR) + FLOOR / probabilities.shape[-1]
    return torch.softmax(spread.log() / temperature, dim=-1).to(probabilities.dtype)


@dataclass(frozen=True)
class Calibration:
    """How much wider intervals must be.

    Args:
        temperature: see :func:`temper`.
        level: probability of the intervals that it was fitted for.
        images: rated images it was fitted on.
        coverage: share of opinions inside such intervals, of images that a fit did not see.
        before: the same without calibration.
        ratings: name of the set of ratings.
        model: the model's name.
        identity: what the scores were made with; a calibration holds for no other model.
    """

    temperature: float
    level: float = 0.95
    images: int = 0
    coverage: float = math.nan
    before: float = math.nan
    ratings: str = ""
    model: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Expected a temperature above 0, but got {self.temperature!r}.")

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """From a file that :meth:`write` made, or from the folder of a model that holds one.

        Raises:
            ValueError: a file that is none.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {name: found[name] for name in cls.__dataclass_fields__ if found.get(name) is not None}
            return cls(**known)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected a calibration that vqr1 calibrate wrote, but {str(path)!r} is none ({error})."
            ) from None

    def write(self, path: str | Path) -> None:
        """As JSON."""
        table = {key: None if value != value else value for key, value in asdict(self).items()}
        Path(path).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")

    def interval(self, distribution: ScoreDistribution, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Central interval of the tempered distribution, as ``(low, high)``, each of shape ``(...)``."""
        tempered = temper(distribution.probabilities, self.temperature)
        return ScoreDistribution(tempered, values=distribution.values).interval(level)
