"""The model card of a checkpoint: what it was trained on, with which settings, and how well it ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqr1_metric import __version__
from vqr1_metric.train_ranker.config import RankerConfig

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [image-quality-assessment, reinforcement-learning-to-rank, vqr1-metric]
---

# {name}

A picture quality ranker, trained from `{model}` with `vqr1_metric` {version} (RL2R, arXiv 2505.14460).
Scores run from 1 to 5; they order pictures and are not calibrated to the MOS of any data set.

    from vqr1_metric import VisualQualityR1Score
    metric = VisualQualityR1Score(model="path/to/this/folder")

## Data

| data set | training pictures | validation pictures |
|---|---|---|
{data}

The terms of these data sets and of the start model apply.

## Validation

{validation}

## Settings

```json
{settings}
```
"""


def write_card(
    folder: Path, config: RankerConfig, facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``README.md``.

    Args:
        folder: the checkpoint.
        facts: the model that was started from, under ``start``; pictures of each data set, under ``train`` and
            ``validation``.
        history: the trainer's log.
    """
    names = list(dict.fromkeys([*facts["train"], *facts["validation"]]))
    data = "\n".join(
        f"| {name} | {facts['train'].get(name, 0)} | {facts['validation'].get(name, 0)} |" for name in names
    )
    settings = {k: v for k, v in asdict(config).items() if v not in (None, [], {})}
    settings["data"] = [Path(path).name for path in config.data]  # folders of this machine say nothing elsewhere
    settings["validation"] = [Path(path).name for path in config.validation]
    for private in ("images", "output_dir"):
        settings.pop(private, None)
    model = Path(facts["start"]).name if Path(facts["start"]).is_absolute() else facts["start"]
    settings["model"] = model
    text = _TEMPLATE.format(
        name=Path(config.output_dir).name or "ranker",
        model=model,
        version=__version__,
        data=data,
        validation=_validation_table(history),
        settings=json.dumps(settings, indent=1),
    )
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")


def _validation_table(history: Sequence[Mapping[str, Any]], rows: int = 10) -> str:
    entries = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    if not entries:
        return "None was made."
    kept = [entries[0], *entries[1:][-(rows - 1) :]]
    shown = ("eval_srcc_", "eval_plcc_", "eval_pairs_")
    columns = [name for name in kept[-1] if name.startswith(shown)]
    lines = ["| step | " + " | ".join(c.removeprefix("eval_").replace("_", " ", 1) for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for entry in kept:
        cells = [entry.get(column) for column in columns]
        told = ["-" if v is None or math.isnan(v) else f"{v:.3f}" for v in cells]
        lines.append(f"| {entry['step']} | " + " | ".join(told) + " |")
    return "\n".join(lines)
