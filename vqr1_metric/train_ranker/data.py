"""What is trained and validated on: label files become two lists of sets, checked before any weights load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vqr1_metric.images import ImageError, load_image
from vqr1_metric.protocol import QUESTION
from vqr1_metric.ratings import RatedImage, RatingError, RatingSet, read_ratings
from vqr1_metric.ratings.sets import raise_problems
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.distill import TaughtImage, read_teacher
from vqr1_metric.train_ranker.scenes import Thumbnails, check_apart, scenes_of, thumbnail

#: As version 0.1.0 called it.
DataError = RatingError
#: Fewer images than this give no rank correlation worth the name.
MIN_VALIDATION = 4


@dataclass(frozen=True)
class Looked:
    """What opening an image shows: a hash of its file, and its thumbnail."""

    digest: str
    thumbnail: Tensor


def prepare_data(
    config: RankerConfig, processes: int = 1, open_pictures: bool = True, digests: dict[int, str] | None = None
) -> tuple[list[RatingSet], list[RatingSet]]:
    """Training and validation sets, read and checked.

    Args:
        config: the settings.
        processes: of the launch.
        open_pictures: open every image once (one process of a launch is enough, unless scenes are found by content).
        digests: takes the hashes of the opened images' files, for :func:`content_digest`.

    Raises:
        RatingError: what was expected, what came, with file and line.
    """
    size = config.comparison_size(processes)
    lower, higher = set(config.lower_is_better), set(config.higher_is_better)
    sets = [*read_sets(config.data, config.images), *read_teacher(config.teacher, config.images)]
    held_out = read_sets(config.validation, config.images)
    told = direct([*sets, *held_out], lower, higher)
    sets, held_out = told[: len(sets)], told[len(sets) :]
    check_questions(told, config.objective)
    fraction = 0.0 if config.validation else config.validation_fraction
    looked: dict[int, Looked] = {}
    by_content = [s for s in sets if fraction and scenes_of(s) is None and not _has_split(s)]
    opened = told if open_pictures or config.teacher else by_content
    if opened:
        looked = look(opened, progress=sum(map(len, told)) > 500)
    if digests is not None:
        digests.update({key: found.digest for key, found in looked.items()})
    thumbnails: Thumbnails = {key: found.thumbnail for key, found in looked.items()}
    if config.validation:
        training = [split_validation(s, 0.0)[0] for s in sets]
    else:
        check_sets(sets, size)
        parts = [split_validation(s, fraction, config.seed, thumbnails) for s in sets]
        training, held_out = [train for train, _ in parts], [val for _, val in parts]
        if config.teacher:
            training, held_out = one_side(training, held_out, looked)
    check_sets(training, size)
    check_validation(held_out)
    if open_pictures:
        check_copies(training, held_out, looked)
        check_apart(training, held_out, thumbnails)
    return training, held_out


def one_side(
    training: Sequence[RatingSet], held_out: Sequence[RatingSet], looked: dict[int, Looked]
) -> tuple[list[RatingSet], list[RatingSet]]:
    """The sets, a teacher's images on the side where ratings have them: each set was split by itself.

    The scene of such an image goes with it. Of a scene that ratings have on both sides, images are left out that
    ratings have on the other side.
    """

    def taught(s: RatingSet) -> bool:
        return all(isinstance(image, TaughtImage) for image in s.images)

    rated = [
        {looked[id(image)].digest for s in sets if not taught(s) for image in s.images} for sets in (training, held_out)
    ]
    by_name = {s.name: s for s in held_out}
    thumbnails = {key: found.thumbnail for key, found in looked.items()}
    sides: tuple[list[RatingSet], list[RatingSet]] = [], []
    for train in training:
        val = by_name.get(train.name, replace(train, images=()))
        if taught(train) and taught(val):
            train, val = _beside(train, val, rated, looked, thumbnails)
        sides[0].append(train)
        sides[1].append(val)
    return sides


def _beside(
    train: RatingSet, val: RatingSet, rated: list[set[str]], looked: dict[int, Looked], thumbnails: Thumbnails
) -> tuple[RatingSet, RatingSet]:
    whole = replace(train, images=(*train.images, *val.images))
    scenes = scenes_of(whole, thumbnails) or [image.name for image in whole.images]
    digests = [looked[id(image)].digest for image in whole.images]
    found: list[set[str]] = [
        {scene for scene, digest in zip(scenes, digests, strict=True) if digest in of_side} for of_side in rated
    ]
    names: tuple[set[str], set[str]] = set(), set()
    for i, (image, scene, digest) in enumerate(zip(whole.images, scenes, digests, strict=True)):
        side = int(i >= len(train))
        if (scene in found[0]) != (scene in found[1]):
            side = int(scene in found[1])
        if digest not in rated[1 - side]:
            names[side].add(image.name)
    return _subset(whole, names[0]), _subset(whole, names[1])


def read_sets(sources: Sequence[str | Path], images: Sequence[str | Path] = ()) -> list[RatingSet]:
    """All data sets of several files, the direction of ``dmos`` columns open."""
    return [s for source in sources for s in read_ratings(source, images, strict=True).by_dataset()]


def read_data(
    sources: Sequence[str | Path],
    images: Sequence[str | Path] = (),
    lower_is_better: Iterable[str] = (),
    higher_is_better: Iterable[str] = (),
) -> list[RatingSet]:
    """All data sets of several files, see :func:`read_sets` and :func:`direct`."""
    if not sources:
        raise RatingError("Expected at least one file of ratings, but got none.")
    return direct(read_sets(sources, images), set(lower_is_better), set(higher_is_better))


def direct(sets: Sequence[RatingSet], lower: set[str], higher: set[str]) -> list[RatingSet]:
    """The sets with the direction of their scores settled.

    Args:
        sets: as they were read.
        lower: names of the sets whose scores are better when lower.
        higher: names of the sets whose ``dmos`` is better when higher.

    Raises:
        RatingError: a name that is none of a set, or a ``dmos`` of unknown direction.
    """
    unknown = (lower | higher) - {s.name for s in sets}
    if unknown or lower & higher:
        raise RatingError(
            f"Expected names of data sets ({', '.join(s.name for s in sets)}) in either lower_is_better or "
            f"higher_is_better, but got {sorted(unknown or lower & higher)[0]!r}."
        )
    for s in sets:
        if s.lower_is_better is None and s.name not in lower | higher:
            raise RatingError(
                f"Expected to be told whether the dmos of {s.name!r} ({s.images[0].where}) is better when lower or "
                "higher, which differs between data sets: name it in lower_is_better (--dmos) or higher_is_better "
                "(--mos)."
            )
    return [replace(s, lower_is_better=s.name in lower) for s in sets]


def check_questions(sets: Sequence[RatingSet], objective: str) -> None:
    """Complain about a file's own question where only the built-in one can be asked."""
    for image in (image for s in sets for image in s.images):
        if image.question not in (None, "", QUESTION) and objective != "sampled":
            raise RatingError(
                f"Expected the built-in question with objective={objective!r}, whose answers are read in one pass, but "
                f"{image.where} asks {image.question!r}. Use objective='sampled', or a file without questions."
            )


def check_sets(sets: Sequence[RatingSet], images_per_comparison: int) -> None:
    """Complain about scores that cannot be learnt from; no image is opened.

    Raises:
        RatingError: one score for all, or fewer images than a comparison set holds.
    """
    names = [s.name for s in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RatingError(f"Expected data sets of different names, but {twice[0]!r} was given twice.")
    for s in sets:
        if s.preferences:
            if images_per_comparison % 2:
                raise RatingError(
                    f"Expected an even images_per_comparison for the preferences of {s.name!r}, which come in pairs, "
                    f"but got {images_per_comparison}."
                )
            units, of_what = 2 * len(s.preferences), "pictures in its pairs"
        else:
            units, of_what = len(s), "pictures"
        if units < images_per_comparison:
            raise RatingError(
                f"Expected at least {images_per_comparison} {of_what} in data set {s.name!r} (a comparison set), but "
                f"got {units}. Add pictures or lower images_per_comparison."
            )
        values = {p.share for p in s.preferences} if s.preferences else set(s.quality)
        if len(values) == 1 and (not s.preferences or values == {0.5}):
            raise RatingError(
                f"Expected scores that differ in data set {s.name!r}, but all {len(s)} are {values.pop():g} "
                f"({s.images[0].where} and the following lines): there is no order to learn."
            )


def _has_split(s: RatingSet) -> bool:
    return any(image.split == "val" for image in s.images)


def split_validation(
    s: RatingSet, fraction: float, seed: int = 0, thumbnails: Thumbnails | None = None
) -> tuple[RatingSet, RatingSet]:
    """Training and validation images of a set.

    The labels' own split counts where it names validation images (rows marked ``test`` are used for nothing). Otherwise
    a fraction is held out, whole scenes at a time (:func:`~vqr1_metric.train_ranker.scenes.scenes_of`), picked by a
    hash of their name and the seed, so that the choice does not depend on order, nor on where the folder of images with
    whole paths lies. Of preferences whole pairs are held
    out; pairs that would straddle are left out, and images without one.

    Returns:
        Two sets of the same name; the second may be empty.
    """
    usable = {image.name: image for image in s.images if image.split != "test"}
    if _has_split(s):
        held_out = {name for name, image in usable.items() if image.split == "val"}
    else:
        scenes = _placeless(scenes_of(s, thumbnails or {}) or [image.name for image in s.images])
        scene = dict(zip((image.name for image in s.images), scenes, strict=True))
        together: set[tuple[str, ...]] = {(scene[name],) for name in usable}
        if s.preferences:
            together = {tuple(sorted((scene[p.a], scene[p.b]))) for p in s.preferences if {p.a, p.b} <= usable.keys()}
        wanted, held_out = round(fraction * len(usable)), set()
        by_scene: dict[str, set[str]] = {}
        for name in usable:
            by_scene.setdefault(scene[name], set()).add(name)
        for names in sorted(
            together, key=lambda names: hashlib.sha256(f"{seed}:{s.name}:{':'.join(names)}".encode()).digest()
        ):
            if len(held_out) >= wanted:
                break
            held_out |= {image for name in names for image in by_scene[name]}
    return _subset(s, usable.keys() - held_out), _subset(s, usable.keys() & held_out)


def _placeless(names: list[str]) -> list[str]:
    """Whole paths (a teacher's file has them) without the folder they share; other names as they are."""
    if not all(map(os.path.isabs, names)) or not names:
        return names
    try:
        root = os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # on several drives
        return names
    return [Path(os.path.relpath(name, root)).as_posix() for name in names]


def _subset(s: RatingSet, names: set[str]) -> RatingSet:
    pairs = tuple(p for p in s.preferences if {p.a, p.b} <= names)
    if s.preferences:  # an image without a pair has nothing to say
        names = {name for p in pairs for name in (p.a, p.b)}
    return replace(s, images=tuple(image for image in s.images if image.name in names), preferences=pairs)


def check_validation(sets: Sequence[RatingSet]) -> None:
    """Complain about validation sets that give no correlation; empty ones are fine."""
    for s in sets:
        if s.preferences or not s.images:
            continue
        if len(s) < MIN_VALIDATION or len(set(s.quality)) == 1:
            raise RatingError(
                f"Expected at least {MIN_VALIDATION} validation pictures of different scores in data set {s.name!r}, "
                f"but got {len(s)}. Raise validation_fraction, or set it to 0 to train without validation."
            )


def look(sets: Sequence[RatingSet], progress: bool = True) -> dict[int, Looked]:
    """Open every image once, as training will; the key is the image's ``id``.

    Raises:
        RatingError: lists the unreadable images with file and line.
    """
    from tqdm import tqdm

    images = [image for s in sets for image in s.images]

    def one(image: RatedImage) -> str | Looked:
        try:
            data = image.read()
            return Looked(hashlib.sha256(data).hexdigest(), thumbnail(load_image(data, image.name)))
        except (ImageError, OSError) as error:
            return f"{image.where}: {error}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(tqdm(pool.map(one, images), total=len(images), desc="checking pictures", disable=not progress))
    raise_problems("readable pictures", [result for result in results if isinstance(result, str)])
    return {id(image): found for image, found in zip(images, results, strict=True) if isinstance(found, Looked)}


def check_copies(train: Sequence[RatingSet], validation: Sequence[RatingSet], looked: dict[int, Looked]) -> None:
    """Complain about one file, under any two names, in training and validation."""
    trained = {looked[id(image)].digest: image for s in train for image in s.images}
    shared = []
    for image in (image for s in validation for image in s.images):
        other = trained.get(looked[id(image)].digest)
        if other is not None:
            shared.append(f"{image.where}: {image.name} is the same picture as {other.name} ({other.where})")
    raise_problems("no picture in both training and validation", shared)


def content_digest(sets: Sequence[RatingSet], digests: dict[int, str] | None = None) -> str:
    """A hash of what is learnt from sets: scores, votes, questions and files, wherever these are."""
    digest = hashlib.sha256()
    for s in sets:
        digest.update(f"{s.name}:{len(s)}:{[(p.a, p.b, p.share) for p in s.preferences]}".encode())
        quality = [float("nan")] * len(s) if s.preferences else s.quality
        for image, value in zip(s.images, quality, strict=True):
            file = digests[id(image)] if digests else hashlib.sha256(image.read()).hexdigest()
            taught = getattr(image, "distribution", None)
            digest.update(f"{value!r}:{image.question}:{file}:{'' if taught is None else taught.tolist()};".encode())
    return digest.hexdigest()


def summary(train: Sequence[RatingSet], validation: Sequence[RatingSet]) -> list[str]:
    """What is trained on, one line for each set."""
    held_out = {s.name: len(s) for s in validation}
    lines = []
    for s in train:
        told = f"{len(s.preferences)} preferences of {len(s)} pictures" if s.preferences else f"{len(s)} pictures"
        lines.append(f"{s.name}: {told} to train on, {held_out.pop(s.name, 0)} to validate on")
    return [*lines, *(f"{name}: {count} pictures to validate on" for name, count in held_out.items())]
