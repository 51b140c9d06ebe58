"""The data sets known by name: one entry is one data set. Nothing is ever downloaded.

The layouts are those in which the owners publish their sets; where only the label files of the VisualQuality-R1 authors
are known, the layout is such a file beside (or above) the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vqr1_metric.ratings.files import read_ratings
from vqr1_metric.ratings.lookup import find_images
from vqr1_metric.ratings.parse import COLUMNS
from vqr1_metric.ratings.sets import Problem, RatedImage, RatingError, RatingSet, without_duplicates
from vqr1_metric.ratings.tables import parse_number, read_table

_ASK = "not verified; see the owners' page"


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Args:
        name: on the command line.
        title: in tables; the column of the published results where there is one.
        where: where to get it.
        licence: the owners' terms, in short.
        layout: what its folder must hold.
        count: labelled pictures of the complete set; None where no source could be read.
        folders: names its folder may have below ``--root``, compared in lower case.
        read: folder -> labels with pictures not looked for yet, and the folder of the pictures.
        split: the official split that an evaluation takes, "all" where there is none.
        short_edge: pictures are reduced to it before scoring.
        suites: what ``--suite`` it belongs to.
    """

    name: str
    title: str
    where: str
    licence: str
    layout: str
    count: int | None
    folders: tuple[str, ...]
    read: Callable[[Path], tuple[RatingSet, Path]]
    split: str = "all"
    short_edge: int | None = None
    suites: tuple[str, ...] = ("paper",)

    def load(self, folder: Path, split: str | None = None) -> RatingSet:
        """Labels with their pictures.

        Args:
            folder: the data set's folder.
            split: train, val, test or all; None for the official one of an evaluation, or all where the labels found
                name no splits.

        Raises:
            RatingError: for a folder that does not hold the set, with how to obtain it.
        """
        try:
            labels, pictures = self.read(folder)
        except RatingError as error:
            raise RatingError(f"{error} {self.how_to_get()}.") from None
        if split is None:
            split = self.split if any(image.split for image in labels.images) else "all"
        complete = len(labels)
        labels = replace(
            labels.take_split(split),
            name=self.title,
            short_edge=self.short_edge,
            expected=self.count if split == "all" else None,
        )
        # The pictures of the other splits have labels too, so only those of the whole set could lack one.
        return find_images(labels, [pictures], report_unlabelled=len(labels) == complete)

    def describe(self) -> str:
        """Name, size, source, terms and layout, in a few lines."""
        count = "count not verified" if self.count is None else f"{self.count} pictures"
        split = "" if self.split == "all" else f", evaluated on its {self.split} split"
        edge = "" if self.short_edge is None else f", reduced to a short edge of {self.short_edge}"
        return (
            f"{self.name:<10} {self.title}: {count}{split}{edge}\n"
            f"           where:   {self.where}\n"
            f"           licence: {self.licence}\n"
            f"           layout:  {self.folders[0]}/ with {self.layout}"
        )

    def how_to_get(self) -> str:
        """What to tell a user who does not have it."""
        return f"{self.title}: get it from {self.where} (licence: {self.licence}); the folder must hold {self.layout}"


def find_folder(dataset: Dataset, root: Path) -> Path | None:
    """The folder of a data set below ``root`` (or ``root`` itself, by its name), None if there is none."""
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        if folder.name.lower() in dataset.folders:
            return folder
    return None


def get_dataset(name: str) -> Dataset:
    """The entry of that name.

    Raises:
        RatingError: for a name there is none of.
    """
    if name not in DATASETS:
        raise RatingError(f"Expected a data set out of {', '.join(DATASETS)}; but got {name!r}.")
    return DATASETS[name]


def load_dataset(name: str, root: str | Path, split: str | None = None) -> RatingSet:
    """A data set below ``root``, or whose folder ``root`` is; see :meth:`Dataset.load`.

    Raises:
        RatingError: an unknown name, or a folder without the set, with how to obtain it.
    """
    dataset, root = get_dataset(name), Path(root)
    if not root.is_dir():
        raise RatingError(f"Expected a folder, but there is no folder {str(root)!r}. {dataset.how_to_get()}.")
    return dataset.load(find_folder(dataset, root) or root, split)


def load_suite(
    name: str, root: str | Path, split: str | None = None, missing: Callable[[str], object] = lambda how: None
) -> list[RatingSet]:
    """Every data set of a suite that is below ``root``.

    Args:
        name: ``"paper"``.
        root: the folder of the data sets.
        split: as for :meth:`Dataset.load`.
        missing: told how to get each that is not there.

    Raises:
        RatingError: an unknown suite, or none of its sets.
    """
    root, found = Path(root), []
    for dataset in suite(name):
        folder = find_folder(dataset, root) if root.is_dir() else None
        if folder is None:
            missing(dataset.how_to_get())
        else:
            found.append(dataset.load(folder, split))
    if not found:
        raise RatingError(f"Expected data sets of {name} in {str(root)!r}, but none is there.")
    return found


def suite(name: str) -> list[Dataset]:
    """The data sets of a suite."""
    found = [dataset for dataset in DATASETS.values() if name in dataset.suites]
    if not found:
        known = sorted({name for dataset in DATASETS.values() for name in dataset.suites})
        raise RatingError(f"Expected a suite out of {', '.join(known)}; but got {name!r}.")
    return found


# ---------------------------------------------------------------- layouts


def _koniq(folder: Path) -> tuple[RatingSet, Path]:
    """MOS on 1 to 100 (z-scored); SD is stated on 1 to 5 and left out, as it is in other units."""
    pictures = _one_of(folder, "1024x768", "512x384", ".")
    file = _find_file(folder, "koniq10k_distributions_sets.csv")
    if file is None:
        file = _find_file(folder, "koniq10k_scores_and_distributions.csv")
        return _table(file, folder, "image_name", "MOS_zscore"), pictures
    return _table(file, folder, "image_name", "MOS", split="set"), pictures


def _spaq(folder: Path) -> tuple[RatingSet, Path]:
    file = _find_file(folder, "MOS and Image attribute scores.xlsx")
    return _table(file, folder, "Image name", "MOS"), _one_of(folder, "TestImage", ".")


def _kadid(folder: Path) -> tuple[RatingSet, Path]:
    """Despite their names, ``dmos`` is higher for better pictures and ``var`` holds standard deviations."""
    file = _find_file(folder, "dmos.csv")
    labels = _table(file, folder, "dist_img", "dmos", std="var", scene="ref_img")
    # I01_05_03.png: picture 1, distortion 5, level 3
    images = tuple(replace(image, method=_part(image.name, 1) or None) for image in labels.images)
    return replace(labels, images=images), _one_of(folder, "images", "distorted_images", ".")


def _agiqa(folder: Path) -> tuple[RatingSet, Path]:
    file = _find_file(folder, "data.csv")
    labels = _table(file, folder, "name", "mos_quality", std="std_quality")
    images = tuple(replace(image, method=_part(image.name, 0)) for image in labels.images)
    return replace(labels, images=images), _one_of(folder, "images", "AGIQA-3K", ".")


def _tid(folder: Path) -> tuple[RatingSet, Path]:
    """``mos_with_names.txt`` says "5.51429 I01_01_1.bmp"; ``mos_std.txt`` has the same order."""
    file = _find_file(folder, "mos_with_names.txt")
    if file is None:
        return _authors(folder), folder
    rows = read_table(file, " ").rows
    std_file = _find_file(folder, "mos_std.txt")
    stds = [math.nan] * len(rows)
    if std_file is not None:
        column = read_table(std_file, " ").rows
        if len(column) != len(rows):
            raise RatingError(
                f"Expected as many rows in {str(std_file)!r} as in {file.name}, {len(rows)}, but got {len(column)}."
            )
        stds = [parse_number(cells[0]) for _, cells in column]
    images, problems = [], []
    for (number, row), std in zip(rows, stds, strict=True):
        mos, where = parse_number(row[0]), f"{file}, line {number}"
        if len(row) < 2 or math.isnan(mos):
            problems.append(Problem("bad row", " ".join(row), "is not a score and a name: left out", where))
            continue
        scene, method = _part(row[1], 0).upper(), _part(row[1], 1)
        images.append(RatedImage(row[1], mos, std, scene, method, where=where))
    kept, duplicates = without_duplicates(images)
    labels = RatingSet("TID2013", tuple(kept), problems=(*problems, *duplicates), sources=(file,))
    return labels, _one_of(folder, "distorted_images", ".")


def _biq2021(folder: Path) -> tuple[RatingSet, Path]:
    """Train.csv and Test.csv, columns "Image Name" and MOS in 0 to 1; the copies "(Images and MOS)" are rescaled."""
    images: list[RatedImage] = []
    sources: list[Path] = []
    problems: list[Problem] = []
    for split in ("Train", "Test"):
        file = _find_file(folder, f"{split}.csv") or _find_file(folder, f"{split} (Images and MOS).csv")
        if file is not None:
            part = _table(file, folder, "Image Name", "MOS")
            images += [replace(image, split=split.lower()) for image in part.images]
            problems += part.problems
            sources.append(file)
    if not sources:
        return _authors(folder), folder
    kept, duplicates = without_duplicates(images)
    labels = RatingSet("BIQ2021", tuple(kept), problems=(*problems, *duplicates), sources=tuple(sources))
    return labels, _one_of(folder, "Images", ".")


def _by_label_file(folder: Path) -> tuple[RatingSet, Path]:
    return _authors(folder), folder


def _authors(folder: Path) -> RatingSet:
    """The one label file in a folder: as the VisualQuality-R1 authors write it, or CSV with a header."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".txt", ".csv", ".tsv"))
    read, why = [], []
    for file in files:
        try:
            read.append(read_ratings(file, strict=False, find=False))
        except RatingError as error:
            why.append(str(error))
    if len(read) == 1:
        return read[0]
    if not read:
        raise RatingError(f"Expected a label file in {str(folder)!r}, but found none. {' '.join(why)}".strip())
    names = ", ".join(labels.sources[0].name for labels in read)
    raise RatingError(
        f"Expected one label file in {str(folder)!r}, but found {names}: name one with --labels, and the pictures with "
        "--images."
    )


def _table(file: Path | None, folder: Path, image: str, mos: str, **others: str) -> RatingSet:
    """Chosen columns of a table whose first row names them; without such a file the authors' label file."""
    if file is None:
        return _authors(folder)
    columns: dict[str, str | int | None] = {**dict.fromkeys(COLUMNS), "image": image, "mos": mos, **others}
    # The sets read this way have higher scores for better images, whatever their columns are called.
    return read_ratings(file, strict=False, columns=columns, lower_is_better=False, find=False)


def _find_file(folder: Path, name: str) -> Path | None:
    """A file of that name, in any case, in the folder or one level below."""
    for path in [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]:
        if path.name.lower() == name.lower() and path.is_file():
            return path
    return None


def _one_of(folder: Path, *names: str) -> Path:
    """The first of these folders that there is, in any case; "." is the folder itself."""
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((below.get(name.lower(), folder) for name in names if name == "." or name.lower() in below), folder)


def _part(name: str, index: int) -> str:
    parts = Path(name).stem.split("_")
    return parts[index] if index < len(parts) else ""


_LABEL_FILE = "the pictures and one label file with lines `image mos [std]` or `reference image mos [std]`"

# Read in the owners' repositories and files: the counts, layouts and terms of KonIQ, SPAQ, SRIQA-Bench, AGIQA-3K and
# BIQ2021, and the terms of CLIVE; in the papers' abstracts: the counts of CLIVE, Min19 and TID2013. The counts of BID
# and KADID-10k are as others cite them. Where terms are _ASK, the owners' page could not be read.
DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "bid",
            "BID",
            "https://www.lps.ufrj.br/profs/eduardo/ImageDatabase.htm (a copy: see github.com/zwx8981/UNIQUE)",
            _ASK,
            _LABEL_FILE,
            586,
            ("bid", "bid512", "imagedatabase"),
            _by_label_file,
        ),
        Dataset(
            "clive",
            "CLIVE",
            "https://live.ece.utexas.edu/research/ChallengeDB/index.html",
            "any purpose, with the University of Texas' copyright notice and a citation",
            _LABEL_FILE,
            1162,
            ("clive", "livec", "challengedb_release", "live_challenge"),
            _by_label_file,
        ),
        Dataset(
            "koniq",
            "KonIQ",
            "https://database.mmsp-kn.de/koniq-10k-database.html",
            "photographs of YFCC100M, each under its own Creative Commons licence",
            "koniq10k_distributions_sets.csv (github.com/subpic/koniq, metadata/) and 1024x768/",
            10073,
            ("koniq", "koniq10k", "koniq-10k", "koniq_10k"),
            _koniq,
            split="test",
        ),
        Dataset(
            "spaq",
            "SPAQ",
            "https://github.com/h4nwei/SPAQ",
            "education and research; commercial use by permission of the authors",
            "Annotations/MOS and Image attribute scores.xlsx and TestImage/",
            11125,
            ("spaq",),
            _spaq,
            short_edge=768,
        ),
        Dataset(
            "liu13",
            "Liu13",
            "Liu et al., A no-reference metric for evaluating the quality of motion deblurring, 2013",
            _ASK,
            _LABEL_FILE,
            None,
            ("liu13", "deblur", "deblurring"),
            _by_label_file,
        ),
        Dataset(
            "sriqa",
            "SRIQA",
            "https://github.com/ChrisDud0257/AFINE (SRIQA-Bench, arXiv 2503.11221)",
            "non-commercial academic research, no redistribution",
            f"{_LABEL_FILE}; all are 1,000 super-resolved pictures and their 100 originals",
            1100,
            ("sriqa", "sriqa-bench", "sriqa_bench"),
            _by_label_file,
        ),
        Dataset(
            "min19",
            "Min19",
            "Min et al., Quality evaluation of image dehazing methods using synthetic hazy images, 2019 (SHRQ)",
            _ASK,
            f"{_LABEL_FILE}; all are 360 regular and 240 aerial pictures",
            600,
            ("min19", "dehaze", "dehazing", "shrq"),
            _by_label_file,
        ),
        Dataset(
            "agiqa3k",
            "AGIQA-3K",
            "https://github.com/lcysyzxdxc/AGIQA-3k-Database",
            "MIT (its repository)",
            "data.csv and the pictures",
            2982,
            ("agiqa3k", "agiqa-3k", "agiqa-3k-database"),
            _agiqa,
        ),
        Dataset(
            "kadid10k",
            "KADID-10k",
            "https://database.mmsp-kn.de/kadid-10k-database.html",
            _ASK,
            "dmos.csv and images/",
            10125,
            ("kadid10k", "kadid-10k", "kadid_10k", "kadid"),
            _kadid,
        ),
        Dataset(
            "tid2013",
            "TID2013",
            "https://www.ponomarenko.info/tid2013.htm",
            _ASK,
            "mos_with_names.txt, mos_std.txt and distorted_images/",
            3000,
            ("tid2013", "tid"),
            _tid,
        ),
        Dataset(
            "biq2021",
            "BIQ2021",
            "https://github.com/nisarahmedrana/BIQ2021",
            "not stated in its repository",
            "Train.csv, Test.csv and Images/",
            12000,
            ("biq2021",),
            _biq2021,
            split="test",
        ),
    )
}
