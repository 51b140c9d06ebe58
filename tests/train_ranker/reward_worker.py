"""Run by torchrun: each process rewards its half of a comparison set and writes what it got.

usage: reward_worker.py FOLDER
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from vqr1_metric.train_ranker.reward import RankingReward


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    whole = json.loads((folder / "batch.json").read_text())
    half = len(whole["completions"]) // 2
    mine = slice(state.process_index * half, (state.process_index + 1) * half)
    rewards = RankingReward(4, 3, scope="global")(**{name: values[mine] for name, values in whole.items()})
    (folder / f"rewards{state.process_index}.json").write_text(json.dumps(rewards))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
