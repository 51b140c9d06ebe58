"""The ranking reward for engines that train on many machines: verl, EasyR1 and ms-swift. See docs/engines.md.

    python examples/engine_rewards.py koniq.csv spaq.txt --images DIR DIR -o data/      # their training data

The engine is given this file as its reward: `verl_rewards` for verl, `compute_score` for EasyR1, and for ms-swift
`--external_plugins`. Each sees a whole batch, as a reply is rewarded by comparison with those about other images of its
data set. A reply without a score earns 0, as does one about an image that is alone in its batch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqr1_metric.protocol import QUESTION, has_form, question
from vqr1_metric.ratings import RatingSet, read_ratings
from vqr1_metric.train_ranker.reward import batch_rewards

#: EasyR1 reads these of the file.
REWARD_NAME, REWARD_TYPE = "vqr1_ranking", "batch"
FORMAT_WEIGHT = 1.0


def rewards(replies: Sequence[str], truths: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The ranking and the format reward of every reply of a batch, in any order.

    Args:
        replies: texts.
        truths: ``image``, ``data_set`` and ``mos`` of each reply's image.
    """
    ranking = batch_rewards(
        replies,
        [truth["image"] for truth in truths],
        [truth["mos"] for truth in truths],
        [truth["data_set"] for truth in truths],
    )
    found = []
    for reply, earned in zip(replies, ranking, strict=True):
        readable = not math.isnan(earned)
        form = float(readable and has_form(reply, thinking=True))
        ranked = earned if readable else 0.0
        found.append({"ranking": ranked, "format": form, "both": ranked + FORMAT_WEIGHT * form})
    return found


def verl_rewards(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str],
    extra_infos: Sequence[Any],
    **_: Any,
) -> list[dict[str, float]]:
    """As verl's batch reward manager calls it; ``score`` is what it trains on, the rest is logged."""
    found = rewards(solution_strs, [json.loads(truth) for truth in ground_truths])
    return [{"score": one["both"], "ranking": one["ranking"], "format": one["format"]} for one in found]


def compute_score(reward_inputs: Sequence[dict[str, Any]], **_: Any) -> list[dict[str, float]]:
    """As EasyR1 calls a batch reward; ``overall`` is what it trains on, the rest is logged."""
    found = rewards(
        [one["response"] for one in reward_inputs], [json.loads(one["ground_truth"]) for one in reward_inputs]
    )
    return [{"overall": one["both"], "format": one["format"], "accuracy": one["ranking"]} for one in found]


class VQR1Ranking:
    """As ms-swift calls a reward: texts, and the columns of the data set."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, completions: Sequence[str], ground_truth: Sequence[str], **_: Any) -> list[float]:
        return [one["both"] for one in rewards(completions, [json.loads(truth) for truth in ground_truth])]


try:
    from swift.rewards import orms
except ImportError:  # another engine, or none
    pass
else:
    orms["vqr1_ranking"] = VQR1Ranking


def rows_of(sets: Sequence[RatingSet]) -> list[dict[str, Any]]:
    """An image, its question and its truth for each rated image."""
    return [
        {
            "image": str(Path(image.path).resolve()) if image.path else image.name,
            "question": question(True, image.question or QUESTION),
            "data_set": s.name,
            "ground_truth": json.dumps({"image": f"{s.name}/{image.name}", "data_set": s.name, "mos": quality}),
        }
        for s in sets
        for image, quality in zip(s.images, s.quality, strict=True)
    ]


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """``verl.parquet``, ``easyr1.jsonl`` and ``ms_swift.jsonl``."""
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    verl = [
        {
            "data_source": row["data_set"],
            "prompt": [{"role": "user", "content": f"<image>{row['question']}"}],
            "images": [{"image": f"file://{row['image']}"}],
            "ability": "quality",
            "reward_model": {"style": "rule", "ground_truth": row["ground_truth"]},
            "extra_info": {"index": i},
        }
        for i, row in enumerate(rows)
    ]
    Dataset.from_list(verl).to_parquet(folder / "verl.parquet")
    lines = {
        "easyr1.jsonl": [
            {"problem": f"<image>{row['question']}", "answer": row["ground_truth"], "images": [row["image"]]}
            for row in rows
        ],
        "ms_swift.jsonl": [
            {
                "messages": [{"role": "user", "content": f"<image>{row['question']}"}],
                "images": [row["image"]],
                "ground_truth": row["ground_truth"],
            }
            for row in rows
        ],
    }
    for name, of_file in lines.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in of_file), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the training data of all three engines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", help="label files")
    parser.add_argument("--images", nargs="+", default=[], help="folders of the images")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(argv)
    sets = [s for path in options.data for s in read_ratings(path, options.images, strict=True).by_dataset()]
    write(rows_of(sets), options.output)


if __name__ == "__main__":
    main()
