"""One process of `test_distributed.py`: RANK WORLD FOLDER MODEL. Writes what it saw to FOLDER/RANK.pt."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from vqr1_metric import QualityScorer, VisualQualityR1Score

warnings.filterwarnings("ignore", message=".*only .*% of the model's answers")
warnings.filterwarnings("ignore", message="The ``compute`` method of metric")


def pictures(count: int) -> torch.Tensor:
    """The first pictures of a fixed series; the tests share it."""
    return torch.rand(count, 3, 56, 56, generator=torch.Generator().manual_seed(7))


def main(rank: int, world: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    scorer = QualityScorer(model, device="cpu", dtype="float32")
    images, seen = pictures(8), {}

    # Uneven: three pictures in two updates against one, then two against none.
    mean = VisualQualityR1Score(scorer=scorer)
    every = VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True)
    for metric in (mean, every):
        for batch in [images[:2], images[2:3]] if rank == 0 else [images[3:4]]:
            metric.update(batch)
    seen["mean"], seen["every"] = mean.compute(), every.compute()
    if rank == 0:
        several = VisualQualityR1Score(scorer=scorer)
        several.update(images[:5])
    else:
        several = VisualQualityR1Score(scorer=scorer)
        several.update(images[5:])
    seen["interval"] = several.confidence_interval()
    seen["distributions"] = every.distributions().probabilities
    seen["local"] = [len(every.details()), len(every.scores), int(mean.moments[0].sum())]
    seen["all details"] = len(every.distributions())
    if rank == 1:
        mean.update(images[4:5])
    seen["mean of five"] = mean.compute()

    # Empty: rank 1 never updates; with keep_distributions it must still send a matrix.
    empty = VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True)
    if rank == 0:
        empty.update(images[:2])
    seen["one rank empty"], seen["one rank empty, distributions"] = empty.compute(), empty.distributions().coverage
    empty.update(images[2:3])
    seen["then filled"] = empty.compute()
    nothing = VisualQualityR1Score(scorer=scorer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing.update(images[:0])
        seen["all empty"] = nothing.compute()

    # forward: the batch's own value, or that of all ranks with dist_sync_on_step.
    for name, sync in (("forward", False), ("forward, synced", True)):
        metric = VisualQualityR1Score(scorer=scorer, dist_sync_on_step=sync)
        seen[name] = [metric(images[rank : rank + 1]), metric(images[rank + 2 : rank + 3]), metric.compute()]

    # Another configuration on another rank is refused everywhere, and what was stored stays.
    other = VisualQualityR1Score(model, device="cpu", dtype="float32", max_pixels=5000 + rank)
    other.update(images[:2])
    try:
        other.compute()
    except ValueError as error:
        seen["refused"] = str(error)
    seen["kept"] = other.moments.double().sum(1)[:2]
    dist.destroy_process_group()
    # Threads of the group that outlive it now and then abort the process as the interpreter ends.
    seen["threads"] = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
    torch.save(seen, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
