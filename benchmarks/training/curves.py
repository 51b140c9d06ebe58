"""Learning curves of training runs as a picture, from what they logged.

    python -m benchmarks.training.curves out/ other/ -o curves.png

Each run is a folder of `vqr1 train` (finished or not: the newest checkpoint's log counts). One panel for each figure
that any run has: reward or fidelity, spread of the scores, readable replies, KL, and validation SRCC from the start
model on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "reward": "mean reward",
    "fidelity": "fidelity",
    "distill": "distance from the teacher",
    "spread": "spread of the mean scores",
    "readable": "readable replies",
    "kl": "KL from the start model",
    "eval_srcc": "validation SRCC",
}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, the start model's validation first."""
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in states if path.is_file()]
    if not found:
        raise SystemExit(f"Expected a run of vqr1 train in {folder}, but it holds no trainer_state.json.")
    log: list[dict[str, Any]] = max(found, key=lambda state: int(state["global_step"]))["log_history"]
    record = folder / "data.json"
    start = json.loads(record.read_text(encoding="utf-8")).get("start") if record.is_file() else None
    return [{"step": 0, **start}, *log] if start else log


def plot(folders: Sequence[Path], output: Path) -> list[str]:
    """Draw the curves; returns the figures that were drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {folder.name or str(folder): read_log(folder) for folder in folders}
    names = [name for name in PANELS if any(name in entry for log in logs.values() for entry in log)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        for label, log in logs.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=label)
        axis.set(title=PANELS[name], xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    print(f"{options.output}: {', '.join(plot(options.runs, options.output))}")


if __name__ == "__main__":
    main()
