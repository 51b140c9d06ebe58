"""What an evaluation found, as a table, as Markdown, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vqr1_metric.evaluation.agreement import STATISTICS
from vqr1_metric.evaluation.columns import Column
from vqr1_metric.evaluation.ladder import ladder_table
from vqr1_metric.evaluation.scoring import process_rank
from vqr1_metric.evaluation.tables import (
    jsonable,
    made_with_text,
    markdown,
    preference_text,
    table,
    write_json,
    write_scores_csv,
    write_table_csv,
    write_text,
)
from vqr1_metric.images.distortions import LEVELS
from vqr1_metric.ratings import RatingSet
from vqr1_metric.ratings.sets import count_problems, problems_text


@dataclass(frozen=True)
class Report:
    """What is common to all reports. Of several processes only the first has results, and writes.

    Args:
        made_with: package, versions, settings, the model's identity.
    """

    made_with: Mapping[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """A row for each scorer and data set, numbers by name: what ``pandas.DataFrame`` takes."""
        raise NotImplementedError

    def markdown(self) -> str:
        """The tables a reader needs, with what was left out and how it was made."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON, NaN as None."""
        raise NotImplementedError

    def save(self, folder: str | Path, *, page: bool = True) -> Path:
        """Write ``table.md``, ``results.json`` and what else the kind of report has; returns the folder.

        Args:
            folder: made where it is missing; files of an earlier report are replaced.
            page: write ``index.html`` and plots too, where the report has them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if process_rank()[0] == 0:
            write_text(folder / "table.md", self.markdown())
            write_json(folder / "results.json", self.to_dict())
            self._save_more(folder, page)
        return folder

    def _save_more(self, folder: Path, page: bool) -> None:
        """Further files of a kind of report."""


@dataclass(frozen=True)
class RatingReport(Report):
    """Agreement with opinion scores.

    Args:
        sets: results of each data set, see :func:`vqr1_metric.evaluation.run.measure`.
        data: its images and every scorer's scores.
    """

    sets: Sequence[Mapping[str, Any]] = ()
    data: Sequence[tuple[RatingSet, Sequence[Column]]] = field(default=(), repr=False)

    def table(self) -> list[dict[str, Any]]:
        """A row for each scorer and data set: every statistic with the ends of its interval."""
        rows = []
        for entry in self.sets:
            for scorer in entry["scorers"]:
                row = {"dataset": entry["dataset"]["name"], "scorer": scorer["name"], "n": scorer["n"]}
                for name in STATISTICS:
                    low, high = scorer["intervals"][name]
                    row |= {name: scorer["values"][name], f"{name}_low": low, f"{name}_high": high}
                rows.append(row)
        return rows

    def markdown(self) -> str:
        """Measured and published rows apart."""
        return markdown(self.sets, self.made_with)

    def to_dict(self) -> dict[str, Any]:
        """``made_with`` and ``sets``."""
        found: dict[str, Any] = jsonable({"made_with": self.made_with, "sets": self.sets})
        return found

    def _save_more(self, folder: Path, page: bool) -> None:
        write_table_csv(folder / "table.csv", self.sets, self.made_with)
        for ratings, columns in self.data:
            write_scores_csv(folder / f"{file_name(ratings.name)}.scores.csv", ratings, columns)
        if not page:
            return
        from vqr1_metric.evaluation.page import evaluation_page, scatter

        for entry, (ratings, columns) in zip(self.sets, self.data, strict=True):
            for row, column in zip(entry["scorers"], columns, strict=True):
                plot = scatter(row, column, ratings)
                if plot is not None:
                    name = f"{file_name(ratings.name)}.{file_name(column.name)}.svg"
                    write_text(folder / name, plot.standalone())
        text = evaluation_page(self.sets, self.data, self.made_with, folder / "cache" / "thumbnails")
        write_text(folder / "index.html", text)


@dataclass(frozen=True)
class VoteReport(Report):
    """Agreement with votes.

    Args:
        name: of the set.
        scorers: name -> figures, see :func:`vqr1_metric.evaluation.preference.preference_agreement`.
        ratings: the votes, and what was left out.
    """

    name: str = ""
    scorers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ratings: RatingSet | None = field(default=None, repr=False)

    def table(self) -> list[dict[str, Any]]:
        """A row for each scorer: shares with the ends of their intervals."""
        rows = []
        for name, found in self.scorers.items():
            row: dict[str, Any] = {"dataset": self.name, "scorer": name}
            for key, value in found.items():
                ends = isinstance(value, tuple)
                row |= dict(zip((key, f"{key}_low", f"{key}_high"), value, strict=True)) if ends else {key: value}
            rows.append(row)
        return rows

    def markdown(self) -> str:
        """The table, the ceiling that the voters' own disagreement sets, and chance."""
        text = f"## {self.name}\n\n{preference_text(self.scorers)}"
        problems = self.ratings.problems if self.ratings else ()
        if problems:
            text += f"\n- Left out or noted (listed in results.json): {problems_text(count_problems(problems))}.\n"
        return text + "\n" + made_with_text(self.made_with)

    def to_dict(self) -> dict[str, Any]:
        """``made_with``, ``preferences`` (the name), ``problems``, ``scorers``."""
        problems = [asdict(problem) for problem in self.ratings.problems] if self.ratings else []
        found: dict[str, Any] = jsonable(
            {"made_with": self.made_with, "preferences": self.name, "problems": problems, "scorers": self.scorers}
        )
        return found


@dataclass(frozen=True)
class LadderReport(Report):
    """Monotonicity along distortions.

    Args:
        pictures: names of the undistorted pictures.
        distortions: their names.
        scorers: name -> distortion -> figures, see :func:`vqr1_metric.evaluation.ladder.ladder_statistics`.
    """

    pictures: Sequence[str] = ()
    distortions: Sequence[str] = ()
    scorers: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """A row for each scorer and distortion."""
        return [
            {"scorer": scorer, "distortion": name, **row}
            for scorer, by_distortion in self.scorers.items()
            for name, row in by_distortion.items()
        ]

    def markdown(self) -> str:
        """One line for each scorer and distortion."""
        head = f"{len(self.pictures)} pictures, {len(self.distortions)} distortions, {LEVELS} levels"
        return f"## Distortion ladder: {head}\n\n{table(ladder_table(self.scorers))}\n{made_with_text(self.made_with)}"

    def to_dict(self) -> dict[str, Any]:
        """``made_with``, ``pictures``, ``distortions``, ``scorers``."""
        found: dict[str, Any] = jsonable({key: getattr(self, key) for key in self.__dataclass_fields__})
        return found


def file_name(name: str) -> str:
    """A data set's name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
