"""Every figure of the model card: agreement with people on what a fold held out, beside peers, and order on Kodak.

    python -m recipes.nano.measure --model DIR --data DIR --fold 0
    python -m recipes.nano.measure --model nano --data DIR --kodak DIR

The model must have been trained with the same fold. Intervals are 95%, by bootstrap over scenes (photographs are scenes
of their own). Without a fold only the photographs' `val` split is measured. With `--kodak`, undistorted pictures are
enlarged twice and four times, and get noise, over-sharpening, ringing or JPEG at eight levels.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

from recipes.nano.folds import srcc_in_scenes, votes_met
from recipes.nano.ladders import FAULTS, add_fault, enlarge
from recipes.nano.seen import open_picture
from recipes.nano.sets import RatedSet, read_folder, read_sets
from vqr1_metric.evaluation.baselines import log_laplacian_variance, luma
from vqr1_metric.evaluation.calibration import calibration
from vqr1_metric.scorer import QualityScorer

REPEATS = 1000


def total_variation(path: Path) -> float:
    """Mean absolute difference of neighbouring pixels of luma."""
    grey = luma(path)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def bytes_per_pixel(path: Path) -> float:
    """Of the file as it is."""
    with Image.open(path) as picture:
        return path.stat().st_size / (picture.width * picture.height)


PEERS: dict[str, Callable[[Path], float]] = {
    "log Laplacian variance": lambda path: log_laplacian_variance(luma(path)),
    "total variation": total_variation,
    "bytes per pixel": bytes_per_pixel,
}


def agreement(rated: RatedSet, indices: Sequence[int], scores: np.ndarray) -> float:
    """Share of the votes met, or SRCC."""
    if rated.wins is not None:
        return votes_met(rated, indices, scores)[0]
    return float(spearmanr(scores, [rated.pictures[i].mos for i in indices]).statistic)


def interval(rated: RatedSet, indices: Sequence[int], scores: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% of the agreement over scenes drawn with replacement; one drawn twice counts twice."""
    places = defaultdict(list)
    for place, i in enumerate(indices):
        places[rated.pictures[i].scene].append(place)
    scenes, rng, found = list(places.values()), np.random.default_rng(seed), []
    mos = np.array([rated.pictures[i].mos for i in indices])
    shares = {}
    if rated.wins is not None:  # votes met and votes of each scene, which add up
        for number, scene in enumerate(scenes):
            among = [indices[place] for place in scene]
            votes = sum(won + lost for *_, won, lost in rated.pairs(set(among)))
            shares[number] = (votes_met(rated, among, scores[scene])[0] * votes if votes else 0.0, votes)
    for _ in range(REPEATS):
        drawn = rng.integers(len(scenes), size=len(scenes))
        if rated.wins is not None:
            met, votes = np.sum([shares[number] for number in drawn], axis=0)
            found.append(met / votes)
        else:
            chosen = np.concatenate([scenes[number] for number in drawn])
            found.append(spearmanr(scores[chosen], mos[chosen]).statistic)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def measure_set(scorer: QualityScorer, rated: RatedSet) -> list[str]:
    """Lines of a table: nano and its peers on the held-out pictures of a set."""
    indices = sorted(rated.held_out)
    paths = [rated.pictures[i].path for i in indices]
    results = scorer.score(paths)
    columns = {"nano": np.array([result.score for result in results])}
    columns |= {name: np.array([peer(path) for path in paths]) for name, peer in PEERS.items()}
    what = "votes met" if rated.wins is not None else "SRCC"
    lines = [
        f"{rated.name}: {len(indices)} pictures of {len({rated.pictures[i].scene for i in indices})} scenes, {what}"
    ]
    if rated.wins is not None:
        lines.append(f"  the majority of each pair meets {votes_met(rated, indices, columns['nano'])[1]:.3f}")
    mos = np.array([rated.pictures[i].mos for i in indices])
    scenes = [rated.pictures[i].scene for i in indices]
    for name, scores in columns.items():
        low, high = interval(rated, indices, scores)
        line = f"  {name:<24} {agreement(rated, indices, scores):.3f} [{low:.3f}, {high:.3f}]"
        if rated.wins is None and len(set(scenes)) < len(scenes):
            line += f", inside scenes {srcc_in_scenes(scenes, scores, mos):.3f}"
        lines.append(line)
    if rated.wins is None:
        rows = [result.distribution.probabilities.tolist() for result in results]
        told = calibration(columns["nano"], [result.std for result in results], mos, rows)
        if "coverage" in told:
            held, scale = told["coverage"]["0.95"], told["scale"]
            lines.append(f"  its 95% intervals hold {held:.1%}, standard deviations times {scale:.2f} would be right")
    return lines


def measure_enlargements(scorer: QualityScorer, paths: Sequence[Path], longest: int = 1024) -> list[str]:
    """Mean score at levels 0 to 8 of each fault on enlargements, and steps at which a picture's score does not fall."""
    lines = []
    for factor in (2, 4):
        starts = []
        for path in paths:
            picture = open_picture(path)
            width, height = (min(side, longest // factor) for side in picture.size)
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            starts.append(enlarge(picture.crop((left, top, left + width, top + height)), factor))
        for fault in FAULTS:
            scores = np.array(
                [
                    [
                        result.score
                        for result in scorer.score(
                            [add_fault(start, fault, level, seed) for seed, start in enumerate(starts)]
                        )
                    ]
                    for level in range(9)
                ]
            )
            means, rises = scores.mean(1), int((np.diff(scores, axis=0) >= 0).sum())
            strict = "falls strictly" if (np.diff(means) < 0).all() else "does not fall strictly"
            told = " ".join(f"{mean:.2f}" for mean in means)
            lines.append(f"x{factor} {fault}: {told}, {strict}, {rises} of {8 * len(starts)} single steps do not fall")
    return lines


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Command line; returns the lines it prints."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--fold", type=int, choices=range(4))
    parser.add_argument("--kodak", type=Path, help="folder of undistorted pictures")
    parser.add_argument("--count", type=int, help="use only so many of them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    scorer, lines = QualityScorer(options.model, dtype=options.dtype, device="cpu"), []

    def say(more: list[str]) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    for rated in read_sets(options.data, options.fold) if options.data else []:
        if rated.held_out:
            say(measure_set(scorer, rated))
    if options.kodak:
        say(measure_enlargements(scorer, read_folder(options.kodak)[: options.count]))
    return lines


if __name__ == "__main__":
    main()
