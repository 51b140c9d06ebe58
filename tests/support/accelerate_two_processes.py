"""Evaluation loops over prepared loaders in two processes: ``python tests/accelerate_two_processes.py FOLDER``.

Each process writes what it counted; test_accelerate.py reads it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from stub_scorer import formula_scorer
from torch.utils.data import DataLoader, IterableDataset

from vqr1_metric import VisualQualityR1Score
from vqr1_metric.integrations.accelerate import update_without_padding

#: name -> options of accelerate, options of the loader
LOADERS = {
    "even": ({}, {}),
    "uneven": ({"even_batches": False}, {}),
    "dispatched": ({"dispatch_batches": True}, {}),
    "split": ({"split_batches": True}, {}),
    "drop_last": ({}, {"drop_last": True}),
}


def pictures(count: int) -> torch.Tensor:
    """Pictures of one grey each, all different."""
    return torch.linspace(0.2, 0.8, count)[:, None, None, None].expand(count, 3, 28, 28).contiguous()


class Stream(IterableDataset):
    """Pictures without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter(pictures(self.count))


def count(data, config: dict, options: dict) -> dict[str, float]:
    """Scores that the metric holds over all processes, and how many this process and a plain update counted."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config))
    loader = accelerator.prepare(DataLoader(data, batch_size=2, **options))
    metric = VisualQualityR1Score(scorer=formula_scorer(), reduction="none")
    plain = VisualQualityR1Score(scorer=formula_scorer(), reduction="none")
    own = 0
    for batch in loader:
        own += update_without_padding(accelerator, metric, batch)
        plain.update(batch)
    return {"own": own, "scores": sorted(metric.compute().tolist()), "plain": len(plain.compute())}


def errors() -> dict[str, str]:
    """What is said where the repeated pictures cannot be known."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    metric = VisualQualityR1Score(scorer=formula_scorer())

    def message(batches, images=lambda batch: batch) -> str:
        try:
            for batch in batches:
                update_without_padding(accelerator, metric, images(batch))
        except ValueError as error:
            return str(error)
        return "no error"

    loader = accelerator.prepare(DataLoader(pictures(5), batch_size=2))
    return {
        "outside": message([pictures(2)]),
        "stream": message(accelerator.prepare(DataLoader(Stream(5), batch_size=2))),
        "too many": message(loader, lambda batch: torch.cat([batch, batch])),
    }


def run(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    results = {
        f"{name} {size}": count(pictures(size), *options) for name, options in LOADERS.items() for size in range(4, 9)
    }
    results["dispatched stream 5"] = count(Stream(5), *LOADERS["dispatched"])
    Path(folder, f"{rank}.json").write_text(json.dumps(results | {"errors": errors()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "ACCELERATE_USE_CPU": "1"}
    # Forked, because the imports above take longer than the work.
    torch.multiprocessing.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")
