"""Does the reasoning name what is wrong with a picture? Sentences for single distortions, and how often they are right.

    python -m recipes.nano.naming --model DIR --pictures DIR --levels 5 6

The sentences are what :mod:`~recipes.nano.reasoning` teaches; the measure takes any model that uses them.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vqr1_metric.images.distortions import DISTORTIONS, distort
from vqr1_metric.scorer import QualityScorer
from vqr1_metric.train_ranker.coldstart import LEVELS as QUALITIES

#: What each distortion is called, in words that are one token each for nano.
PHRASES = {
    "blur": "blur",
    "motion_blur": "motion blur",
    "noise": "colour noise",
    "grey_noise": "grey noise",
    "impulse_noise": "bright and dark pixels",
    "jpeg": "JPEG blocks",
    "webp": "smeared compression",
    "jpeg2000": "compression ringing",
    "rescale": "low resolution",
    "pixelate": "large pixels",
    "contrast": "loss of contrast",
    "colour": "loss of colour",
    "darken": "loss of light",
    "overexpose": "clipped highlights",
    "posterise": "banding",
    "colour_cast": "colour cast",
}
#: How strong it is, for levels 1 and 2, 3 and 4, 5 and 6, 7 and 8.
DEGREES = ("slight", "noticeable", "strong", "severe")
CLEAN = "no obvious distortion"
#: Names that a count of right names may treat as one, because their pictures hardly differ.
FAMILIES = (("blur", "motion_blur", "rescale"), ("noise", "grey_noise"), ("jpeg", "webp", "jpeg2000"))


def remark(name: str | None, level: int = 0) -> str:
    """What the picture shows: ``"strong motion blur"``, ``"no obvious distortion"``."""
    return CLEAN if name is None or level == 0 else f"{DEGREES[(level - 1) // 2]} {PHRASES[name]}"


def thought(shown: str, score: float) -> str:
    """The reasoning: what the picture shows, and the level of quality of a score in [1, 5]."""
    quality = QUALITIES[min(len(QUALITIES) - 1, int((score - 1) / 4 * len(QUALITIES)))]
    return f"<think> The picture shows {shown}. The overall quality is {quality}.</think>\n"


def named(reasoning: str) -> str | None:
    """The distortion that a reasoning names, ``"clean"``, or None if it is neither."""
    if CLEAN in reasoning:
        return "clean"
    found = [name for name, phrase in PHRASES.items() if any(f"{degree} {phrase}" in reasoning for degree in DEGREES)]
    return found[0] if len(found) == 1 else None


def alike(shown: str, said: str | None) -> bool:
    """Are these the same distortion, or of one family?"""
    return shown == said or any(shown in family and said in family for family in FAMILIES)


@dataclass
class Naming:
    """How often a model named what it was shown.

    Args:
        counts: how often which was named, by (shown, named).
        scores: mean score of each level of each distortion.
    """

    counts: Counter
    scores: dict[tuple[str, int], float]

    def share(self, shown: str | None = None, family: bool = False) -> float:
        """Share of the distorted pictures (of one distortion) whose reasoning names it, or one of its family."""
        asked = {key: c for key, c in self.counts.items() if key[0] == shown or (shown is None and key[0] != "clean")}
        right = sum(c for (s, n), c in asked.items() if (alike(s, n) if family else s == n))
        return right / max(1, sum(asked.values()))

    def table(self) -> str:
        """For each distortion the share named rightly, and what else was said."""
        lines = [f"{'shown':<14} {'right':>6}  also named"]
        for shown in dict.fromkeys(s for s, _ in self.counts):
            others = [(n, c) for (s, n), c in self.counts.most_common() if s == shown and n != shown]
            lines.append(
                f"{shown:<14} {self.share(shown):6.0%}  " + ", ".join(f"{n or 'nothing'} {c}" for n, c in others)
            )
        return "\n".join(lines)


def greedy(model: str) -> QualityScorer:
    """A scorer that reads the model's most probable reply to the thinking question."""
    return QualityScorer(model, "sample", thinking=True, add_vision_id=False, num_samples=1, top_k=1, max_new_tokens=64)


def measure(scorer: QualityScorer, pictures: Sequence, levels: Sequence[int], names: Sequence[str] = ()) -> Naming:
    """Show every picture clean and with each distortion alone, and read what the reasoning names.

    Args:
        scorer: see :func:`greedy`.
        pictures: PIL pictures without distortions.
        levels: strengths of :mod:`vqr1_metric.images.distortions`, 1 to 8.
        names: distortions, all by default.
    """
    counts: Counter = Counter()
    scores: dict[tuple[str, int], float] = {}
    for name, level in [("clean", 0), *((n, level) for n in names or DISTORTIONS for level in levels)]:
        shown = [distort(p, name, level, seed=i) if level else p for i, p in enumerate(pictures)]
        results = scorer.score(shown)
        counts.update((name, named(r.replies[0].reasoning)) for r in results)
        readable = [r.score for r in results if r.error is None]
        scores[name, level] = sum(readable) / len(readable) if readable else math.nan
    return Naming(counts, scores)


def main(arguments: Sequence[str] | None = None) -> Naming:
    """Command line; see the module's docstring."""
    from vqr1_metric.images import SUFFIXES

    parser = argparse.ArgumentParser(prog="python -m recipes.nano.naming", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of undistorted pictures")
    parser.add_argument("--count", type=int, help="use only so many of them")
    parser.add_argument("--levels", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--names", nargs="+", default=[], choices=tuple(DISTORTIONS), metavar="NAME")
    parser.add_argument("--csv", type=Path, help="write the counts to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from PIL import Image

    paths = sorted(p for p in options.pictures.iterdir() if p.suffix.lower() in SUFFIXES)[: options.count]
    pictures = [Image.open(p).convert("RGB") for p in paths]
    found = measure(greedy(options.model), pictures, options.levels, options.names)
    print(found.table())
    print(
        f"{len(paths)} pictures, levels {' '.join(map(str, options.levels))}: named rightly {found.share():.1%}, "
        f"within its family {found.share(family=True):.1%}"
    )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["shown", "named", "pictures"])
            writer.writerows([shown, said or "", count] for (shown, said), count in found.counts.items())
    return found


if __name__ == "__main__":
    main()
