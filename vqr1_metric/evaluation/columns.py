"""The scorers that an evaluation compares: a model or a file of scores, then others, then the baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vqr1_metric.evaluation.baselines import BASELINES, baseline_scores
from vqr1_metric.evaluation.peers import match_scores, pyiqa_metric, read_scores
from vqr1_metric.evaluation.scoring import made_by, process_rank, score_items
from vqr1_metric.ratings import RatedImage, RatingError, RatingSet
from vqr1_metric.scorer import QualityScorer

#: A scorer, or scores that it made: a file (a path), or name of the image -> score.
Source = QualityScorer | str | Path | Mapping[str, float]
Rows = Sequence[Mapping[str, Any] | None]


class Bar(Protocol):
    """What a progress bar must be able to do."""

    def update(self, count: int = 1) -> object:
        """So many more are done."""


#: Makes a bar of a label and how many there will be, as a context.
Progress = Callable[[str, int], AbstractContextManager[Bar]]


class _Silent:
    def update(self, count: int = 1) -> None:
        """Nothing is shown."""


def no_progress(label: str, total: int) -> AbstractContextManager[Bar]:
    """No bar."""
    return nullcontext(_Silent())


@dataclass(frozen=True)
class Column:
    """Scores of one scorer for the pictures of one data set.

    Args:
        name: as tables call it.
        kind: ``model``, ``scores`` (made before), ``pyiqa`` or ``baseline``.
        rows: for each picture what is known: ``score``, ``std``, ``probabilities``, ``error``; None for nothing.
        lower_is_better: turned round before anything is computed.
        identity: what the scores were made with.
    """

    name: str
    kind: str
    rows: Rows
    lower_is_better: bool = False
    identity: Mapping[str, Any] | None = None

    def values(self, key: str) -> list[float]:
        """A number of each picture; NaN where there is none."""
        found = [None if row is None else row.get(key) for row in self.rows]
        return [math.nan if value is None else float(value) for value in found]

    @property
    def scores(self) -> list[float]:
        """Scores with higher meaning better."""
        return [-score if self.lower_is_better else score for score in self.values("score")]


@dataclass(frozen=True)
class Contenders:
    """Who is compared, settled before a picture is scored: what is wrong with them should not come out later.

    Args:
        sources: name -> scorer or scores, the first is the one that the others are compared with.
        metrics: name -> function, of pyiqa.
        lower_is_better: names of scores that are better when lower.
        baselines: let the scorers without parameters take part.
        cache: folder of the models' scores.
        progress: bars.
    """

    sources: Mapping[str, QualityScorer | Mapping[str, Mapping[str, Any]]]
    metrics: Mapping[str, Callable[[Path, int | None], dict[str, Any]]]
    lower_is_better: frozenset[str]
    baselines: bool
    cache: Path
    progress: Progress

    def columns(self, ratings: RatingSet) -> list[Column]:
        """The scores of each for one data set; in all processes but the first only those of models and files."""
        images, edge = ratings.images, ratings.short_edge
        found = []
        for name, source in self.sources.items():
            if isinstance(source, QualityScorer):
                with self.bar(ratings.name, len({image.path for image in images})) as bar:
                    rows: Rows = score_items(source, images, self.cache, edge, bar.update)
                found.append(Column(name, "model", rows, identity=made_by(source, edge)))
            else:
                rows = match_scores(source, images)
                if not any(rows):
                    raise RatingError(
                        f"Expected scores of the {len(images)} pictures of {ratings.name} in {name!r}, but it holds a "
                        "score for none of them."
                    )
                found.append(Column(name, "scores", rows, name in self.lower_is_better))
        if process_rank()[0] > 0:
            return found  # the first process does the rest
        for name, metric in self.metrics.items():
            rows = self._each(name, images, partial(_measure, metric, edge))
            found.append(Column(name, "pyiqa", rows))
        if self.baselines:
            measured = self._each("baselines", images, partial(_measure, baseline_scores, edge))
            found += [Column(name, "baseline", [{"score": row[name]} for row in measured]) for name in BASELINES]
        return found

    def bar(self, label: str, total: int) -> AbstractContextManager[Bar]:
        """A bar that says what process it is of."""
        rank, processes = process_rank()
        return self.progress(label if processes == 1 else f"{label} (process {rank + 1} of {processes})", total)

    def _each(
        self, label: str, images: Iterable[RatedImage], function: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        images = list(images)
        found = []
        with self.bar(label, len(images)) as bar:
            for image in images:
                found.append(function(image))
                bar.update()
        return found


def _measure(
    metric: Callable[[Path, int | None], dict[str, Any]], edge: int | None, image: RatedImage
) -> dict[str, Any]:
    assert image.path is not None
    return metric(image.path, edge)


def gather(
    scorer: Source | Mapping[str, Source],
    against: Mapping[str, Source] | Sequence[Source] = (),
    *,
    pyiqa: Sequence[str] = (),
    lower_is_better: Sequence[str] = (),
    baselines: bool = True,
    cache: Path,
    progress: Progress = no_progress,
    device: str | None = None,
) -> Contenders:
    """Name the scorers, read files of scores, make pyiqa's metrics.

    Raises:
        RatingError: two scorers of one name, a name in ``lower_is_better`` that none has, a file that holds no scores.
    """
    given = [*_named(scorer), *_named(against)]
    names = [name for name, _ in given]
    twice = Counter([*names, *pyiqa, *(BASELINES if baselines else ())])
    for name, count in twice.items():
        if count > 1:
            raise RatingError(
                f"Expected different names, but two scorers are called {name!r}: rename one (--against NAME=FILE)."
            )
    made_before = [name for name, source in given if not isinstance(source, QualityScorer)]
    unknown = sorted(set(lower_is_better) - set(made_before))
    if unknown:
        raise RatingError(
            f"Expected names of scores ({', '.join(made_before) or 'none'}) as those that are better when lower, but "
            f"none is called {unknown[0]!r}."
        )
    sources: dict[str, QualityScorer | Mapping[str, Mapping[str, Any]]] = {}
    for name, source in given:
        if isinstance(source, QualityScorer):
            sources[name] = source
        elif isinstance(source, str | Path):
            sources[name] = read_scores(source)
        else:
            sources[name] = {image: {"score": float(score)} for image, score in source.items()}
    first = process_rank()[0] == 0  # the others only help with the models' scores
    metrics = {name: pyiqa_metric(name, device) for name in pyiqa} if first else {}
    return Contenders(sources, metrics, frozenset(lower_is_better), baselines, cache, progress)


def _named(given: Any) -> list[tuple[str, Source]]:
    if isinstance(given, QualityScorer):
        return [(model_name(given), given)]
    if isinstance(given, str | Path):
        return [(Path(given).stem, given)]
    if isinstance(given, Mapping):
        if any(isinstance(value, QualityScorer | str | Path | Mapping) for value in given.values()):
            return list(given.items())
        return [("scores", given)] if given else []
    return [named for source in given for named in _named(source)]


def model_name(scorer: QualityScorer) -> str:
    """What tables call a model: its name without its folder, with the mode if that is not the usual one."""
    name = Path(str(scorer.card()["model"])).name
    return name if scorer.mode == "score" else f"{name} ({scorer.mode})"
