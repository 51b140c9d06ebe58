"""The rated pictures the recipe knows: five sets, each a folder with its label file.

Opinions are compared inside a set or a scene only; sets of opinions (`mos`) and sets of votes (`wins`) differ in what
is known of two pictures. Scenes (prompts, original pictures) are held out as a whole.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Rated:
    """One rated picture: its file, its scene, and its mean opinion on 1 to 5 (NaN in sets of votes)."""

    path: Path
    scene: str
    mos: float = math.nan


@dataclass
class RatedSet:
    """A set of rated pictures.

    Args:
        name: as in the reports.
        pictures: all of them.
        held_out: indices of those that are kept for figures.
        wins: in sets of votes, how often one picture (first index) was preferred to another (second index).
    """

    name: str
    pictures: list[Rated]
    held_out: set[int] = field(default_factory=set)
    wins: dict[tuple[int, int], float] | None = None

    def hold_out(self, every: int, start: int) -> None:
        """Keep every so-many-th scene, counted from ``start``."""
        scenes = sorted({picture.scene for picture in self.pictures})[start::every]
        self.held_out = {i for i, picture in enumerate(self.pictures) if picture.scene in scenes}

    def pairs(self, among: set[int]) -> Iterator[tuple[int, int, float, float]]:
        """``(first, second, wins of the first, wins of the second)`` of each voted pair of these pictures."""
        for (i, j), won in (self.wins or {}).items():
            if i in among and j in among and (i < j or (j, i) not in self.wins):
                yield i, j, won, self.wins.get((j, i), 0.0)


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _file(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else folder / "images" / name


def photographs(folder: Path) -> RatedSet:
    """BIQ2021: image, split, mos in 0..1, which becomes 1 + 4 mos. ``val`` is held out always."""
    rows = [row for row in _rows(folder / "labels.csv") if _file(folder, row["image"]).exists()]
    pictures = [Rated(_file(folder, row["image"]), row["image"], 1 + 4 * float(row["mos"])) for row in rows]
    return RatedSet("photographs", pictures, {i for i, row in enumerate(rows) if row["split"] == "val"})


def generated(folder: Path) -> RatedSet:
    """AVT-AI: image, prompt, quality_mos."""
    rows = _rows(folder / "labels.csv")
    pictures = [Rated(_file(folder, row["image"]), row["prompt"], float(row["quality_mos"])) for row in rows]
    return RatedSet("generated", pictures)


def super_resolution(folder: Path) -> RatedSet:
    """SR4KIQA: image, scene, mos."""
    rows = _rows(folder / "labels.csv")
    pictures = [Rated(_file(folder, row["image"]), row["scene"], float(row["mos"])) for row in rows]
    return RatedSet("super_resolution", pictures)


def best_of_four(folder: Path) -> RatedSet:
    """Votes for the best method of a scene: image, scene, best_votes. Each vote is one against the three others."""
    rows = _rows(folder / "labels.csv")
    pictures = [Rated(_file(folder, row["image"]), row["scene"]) for row in rows]
    wins = {
        (i, j): float(a["best_votes"])
        for i, a in enumerate(rows)
        for j, b in enumerate(rows)
        if i != j and a["scene"] == b["scene"]
    }
    return RatedSet("super_resolution_votes", pictures, wins=wins)


def pairwise(folder: Path) -> RatedSet:
    """Votes on pairs: labels.csv with image, scene; pairs.csv with image_a, image_b, a_preferred, b_preferred."""
    rows = _rows(folder / "labels.csv")
    place = {row["image"]: i for i, row in enumerate(rows)}
    wins: dict[tuple[int, int], float] = {}
    for row in _rows(folder / "pairs.csv"):
        i, j = place[row["image_a"]], place[row["image_b"]]
        wins[i, j] = wins.get((i, j), 0) + float(row["a_preferred"])
        wins[j, i] = wins.get((j, i), 0) + float(row["b_preferred"])
    return RatedSet("gan_votes", [Rated(_file(folder, row["image"]), row["scene"]) for row in rows], wins=wins)


#: Folder of each set, and what reads it.
READERS = {
    "biq2021": photographs, "avt-ai": generated, "sr4kiqa": super_resolution, "sr-preference": best_of_four,
    "gan-2afc": pairwise,
}  # fmt: skip


def read_sets(root: Path, fold: int | None) -> list[RatedSet]:
    """The sets whose folders are there; with a fold (0 to 3), every fourth scene of each is held out."""
    found = [read(root / name) for name, read in READERS.items() if (root / name / "labels.csv").is_file()]
    if not any(one.name == "photographs" for one in found):
        raise SystemExit(f"Expected at least {root}/biq2021/labels.csv, which fixes the scale, but it is not there.")
    for one in found:
        if fold is not None and not one.held_out:
            scenes = len({picture.scene for picture in one.pictures})
            one.hold_out(min(4, scenes), fold % min(4, scenes))
    return found


def read_folder(folder: Path) -> list[Path]:
    """Files of undistorted pictures."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp"))
