"""``vqr1 diff`` as a call: methods in folders or files of scores, paired, scored, compared."""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vqr1_metric import score_files
from vqr1_metric.evaluation.paired import (
    MethodOrder,
    PairedDifference,
    compare_methods,
    compare_paired,
    win_probabilities,
)
from vqr1_metric.evaluation.pairing import Pairing, group_scenes, image_names, pair_names
from vqr1_metric.evaluation.peers import read_scores
from vqr1_metric.evaluation.scoring import made_by, score_items
from vqr1_metric.evaluation.tables import jsonable
from vqr1_metric.ratings import RatedImage, RatingError
from vqr1_metric.scorer import QualityScorer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MethodReport:
    """What came out of :func:`diff`.

    Args:
        pairing: which files were compared with which.
        rows: method -> for each scene what is known of its file: ``score``, ``std``, ``probabilities``, ``error``.
        difference: of two methods, the second minus the first; None for more.
        order: of all methods.
        groups: the group of each scene, None without.
        identity: what the scores were made with, None for files of scores that do not say.
        warning: what is known of the judge's limits, None where it says nothing.
    """

    pairing: Pairing
    rows: Mapping[str, Sequence[Row]]
    difference: PairedDifference | None
    order: MethodOrder
    groups: Sequence[str] | None
    identity: Mapping[str, Any] | None
    warning: str | None

    @property
    def failed(self) -> list[str]:
        """``method/file: reason`` of every file without a score."""
        return [
            f"{method}/{name}: {row.get('error') or 'no score'}"
            for method, rows in self.rows.items()
            for name, row in zip(self.pairing.files[method], rows, strict=True)
            if math.isnan(_score(row))
        ]

    def scenes(self) -> list[dict[str, Any]]:
        """One entry for each scene: its name, files and scores; of two methods difference and win probability too."""
        entries: list[dict[str, Any]] = []
        methods = list(self.rows)
        wins = win_probabilities(*self.rows.values()) if self.difference is not None else []
        for i, scene in enumerate(self.pairing.scenes):
            entry: dict[str, Any] = {"scene": scene}
            if self.groups is not None:
                entry["group"] = self.groups[i]
            scores = [_score(rows[i]) for rows in self.rows.values()]
            if self.difference is None:
                entry |= dict(zip(methods, scores, strict=True))
            else:
                entry |= {"before": scores[0], "after": scores[1], "difference": scores[1] - scores[0]}
                entry["after_wins"] = wins[i]
            entry["files"] = [names[i] for names in self.pairing.files.values()]
            entries.append(entry)
        return entries

    def to_dict(self) -> dict[str, Any]:
        """Everything, NaN as None, ready for JSON."""
        found: dict[str, Any] = jsonable({
            **(asdict(self.difference) if self.difference is not None else {}),
            "methods": list(self.rows),
            "order": asdict(self.order),
            "pairing": {"rule": self.pairing.rule, "left_out": [str(p) for p in self.pairing.problems]},
            "identity": self.identity,
            "warning": self.warning,
            "scenes": self.scenes(),
        })  # fmt: skip
        return found

    def csv(self) -> str:
        """A line for each scene."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        entries = self.scenes()
        writer.writerow([score_files.cell(name) for name in entries[0] if name != "files"])
        for entry in entries:
            cells = [value for name, value in entry.items() if name != "files"]
            writer.writerow([score_files.cell(v) if isinstance(v, str) else _number(v) for v in cells])
        return text.getvalue()

    def text(self) -> str:
        """The answer in words."""
        methods = list(self.rows)
        lines = [f"no score: {told}" for told in self.failed]
        lines += [f"paired {self.pairing.rule}: {len(self.pairing.scenes)} scenes of {len(methods)} methods"]
        lines += [f"  {line}" for line in self.pairing.lines()]
        if self.difference is not None:
            lines += _verdict(self.difference, methods[0], methods[1], self.groups is not None)
        else:
            lines += _ranking(self.order, self.groups is not None)
        if self.warning:
            lines.append(f"about this judge: {self.warning}")
        return "\n".join(lines)


def diff(
    methods: Sequence[str | Path],
    scorer: QualityScorer | Callable[[], QualityScorer] | None = None,
    *,
    strip: Sequence[str] = (),
    group: str | None = None,
    level: float = 0.95,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> MethodReport:
    """Which of several methods made better pictures of the same scenes?

    Args:
        methods: at least two folders of pictures, or files of scores that ``vqr1 score`` wrote.
        scorer: judges the folders, or makes the scorer that does; None where all methods are files of scores.
        strip: see :func:`~vqr1_metric.evaluation.pairing.pair_names`.
        group: scenes that are not independent, see :func:`~vqr1_metric.evaluation.pairing.group_scenes`.
        level: probability of intervals; a verdict needs p of at most 1 minus this.
        cache: keep the scores in this folder and use those that are there.
        progress: told how many pictures have just been done.
        begin: told how many there are, before the first.

    Raises:
        RatingError: methods that cannot be paired, files of scores made with different settings.

    Example::

        report = diff(["bicubic/", "swinir/"], QualityScorer("nano"), group="folder")
        print(report.text())
    """
    sources = {str(method): Path(method) for method in methods}
    if len(sources) < 2:
        raise RatingError(f"Expected at least two different methods, but got {len(sources)}.")
    files = {name: read_scores(path) for name, path in sources.items() if path.is_file()}
    names = {name: list(files[name]) if name in files else image_names(path) for name, path in sources.items()}
    pairing = pair_names(names, strip)
    groups = None if group is None else group_scenes(pairing.scenes, group)
    identities = {name: _identity_of_file(sources[name]) for name in files}
    judged = [name for name in sources if name not in files]
    judge = None
    if judged:
        judge = scorer if isinstance(scorer, QualityScorer) else scorer() if scorer is not None else None
        if judge is None:
            raise RatingError(f"Expected a scorer for the pictures in {judged[0]!r}, but got none.")
        identities[judged[0]] = made_by(judge)
    identity = _one_identity(identities)
    images = [RatedImage(name, path=sources[m] / name) for m in judged for name in pairing.files[m]]
    begin(len(images))
    with tempfile.TemporaryDirectory() as folder:
        scored = iter(score_items(judge, images, cache or Path(folder), progress=progress) if judge else ())
    rows: dict[str, list[Row]] = {}
    for name in sources:
        paired = pairing.files[name]
        rows[name] = [files[name][file] for file in paired] if name in files else [next(scored) for _ in paired]
    scores = {name: [_score(row) for row in found] for name, found in rows.items()}
    difference = None
    if len(sources) == 2:
        first, second = sources
        wins = win_probabilities(rows[first], rows[second])
        difference = compare_paired(scores[first], scores[second], wins, groups=groups, level=level)
    order = compare_methods(scores, groups=groups, level=level)
    return MethodReport(pairing, rows, difference, order, groups, identity, judge_warning(judge))


def judge_warning(scorer: QualityScorer | None) -> str | None:
    """What the folder of a model says of its limits, in one line; None where it says nothing."""
    from vqr1_metric import nano

    warning_for = getattr(nano, "warning_for", None)
    spec = getattr(scorer, "spec", None)
    return warning_for(spec.folder) if warning_for is not None and spec is not None else None


def _identity_of_file(path: Path) -> dict[str, Any] | None:
    try:
        meta = score_files.read_meta(path)
    except score_files.RecordError:
        return None
    identity = meta.get("identity")
    known = {"model": meta.get("model"), "revision": meta.get("revision")}
    return {**known, **identity} if isinstance(identity, dict) else None


def _one_identity(identities: Mapping[str, Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """What all scores were made with; scores of different settings must not be compared."""
    known = {name: identity for name, identity in identities.items() if identity is not None}
    if not known:
        return None
    first, *others = known
    names = ("model", "revision", "short_edge")  # a path says nothing: the hashes do
    for name in others:
        for key in sorted(set(known[first]) | set(known[name])):
            if key not in names and known[first].get(key) != known[name].get(key):
                raise RatingError(
                    f"Expected scores made with the same settings, but {key} is {known[first].get(key)!r} in {first} "
                    f"and {known[name].get(key)!r} in {name}."
                )
    return known[first]


def _score(row: Row) -> float:
    score = row.get("score")
    return math.nan if score is None else float(score)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6f}"


def _verdict(found: PairedDifference, before: str, after: str, grouped: bool) -> list[str]:
    units = "groups" if grouped else "scenes"
    of = f" ({found.images} scenes; each group counts once)" if grouped else ""
    lines = [
        f"{found.n} {units}{of}: after is better in {found.better}, worse in {found.worse}, equal in {found.equal}"
    ]
    if math.isnan(found.interval[0]):
        return [*lines, f"verdict: open, {found.reason}"]
    low, high = found.interval
    lines.append(
        f"mean difference {found.mean:+.3f}, {found.level:.0%} interval {low:+.3f} to {high:+.3f} (p = {found.p:.2g})"
    )
    if not math.isnan(found.win_probability):
        lines.append(
            f"chance that after looks better in a scene, from the score distributions: {found.win_probability:.1%}"
        )
    needed = "no number would" if found.needed is None else f"about {found.needed} would"
    if found.verdict != "open":
        return [*lines, f"verdict: {after if found.verdict == 'after' else before} is better"]
    if found.reason:
        return [*lines, f"verdict: open, {found.reason}"]
    return [
        *lines,
        "verdict: open, chance alone would give as much",
        f"{units} to settle a difference of this size (80% power): {needed}; there are {found.n}",
    ]


def _ranking(order: MethodOrder, grouped: bool) -> list[str]:
    width = max(len(name) for name in order.names)
    lines = [f"{'method':<{width}}  mean   differs"]
    lines += [
        f"{name:<{width}}  {mean:.3f}  {letters}"
        for name, mean, letters in zip(order.names, order.means, order.letters, strict=True)
    ]
    lines.append("methods that share a letter do not differ (all pairs, p after Holm)")
    for better, worse, pair in order.pairs:
        low, high = pair.interval
        p = "–" if math.isnan(pair.p_holm) else f"{pair.p_holm:.2g}"
        told = f"{pair.mean:+.3f} [{low:+.3f}, {high:+.3f}], p = {p}"
        lines.append(f"{better} over {worse}: {told}{'' if pair.verdict != 'open' else ', open'}")
    reasons = set(chain.from_iterable([pair.reason] if pair.reason else [] for _, _, pair in order.pairs))
    lines += sorted(reasons)
    if order.left_out:
        lines.append(f"{order.left_out} scenes lack a score of a method: left out")
    return lines
