"""accelerate: score each picture of an evaluation loop once, on the process that has it.

With several processes a prepared loader repeats pictures so that every process gets equally many (5 pictures in batches
of 2 on 2 processes become 8), and a plain ``metric.update`` would count the repeated ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard

from vqr1_metric.images import ImageLike, split_images
from vqr1_metric.metric import VisualQualityR1Score


def update_without_padding(
    accelerator: Accelerator, metric: VisualQualityR1Score, images: ImageLike | Sequence[ImageLike]
) -> int:
    """``metric.update`` without the pictures that the loader repeated to fill its last batch.

    Nothing is gathered: each process scores its own pictures, and ``metric.compute()``, which every process must call,
    covers all of them. Unlike ``accelerator.gather_for_metrics`` this takes pictures of unequal sizes, paths too.

        for batch in loader:                       # loader = accelerator.prepare(loader)
            update_without_padding(accelerator, metric, network(batch).clamp(0, 1))
        score = metric.compute()

    Args:
        accelerator: the one that prepared the loader.
        metric: its scores move to the accelerator's device if need be; the judge stays where it is.
        images: one picture for every sample of the current batch of this process, in its order.

    Returns:
        How many of this process's pictures counted.

    Raises:
        ValueError: outside a loop over a prepared loader, for a number of pictures that is not that of the samples, and
            at the end of a loader that cannot say how many samples it had (a stream without a length).
    """
    images = split_images(images)
    count = _own_samples(accelerator, len(images))
    if metric.device != accelerator.device:
        metric.to(accelerator.device)
    if count:
        metric.update(images[:count])
    return count


def _own_samples(accelerator: Accelerator, given: int) -> int:
    """How many of the samples of this process's current batch are no repetitions."""
    if accelerator.num_processes == 1:
        return given
    state = accelerator.gradient_state
    loader = state.active_dataloader
    if loader is None:
        raise ValueError(
            "Expected a call inside the loop over a loader that accelerator.prepare returned; outside, it cannot be "
            "known which pictures are repeated."
        )
    if getattr(loader, "_drop_last", False):
        return given  # an incomplete round is left out, nothing is repeated
    if isinstance(loader, DataLoaderShard):
        sampler = loader.batch_sampler
        if isinstance(sampler, BatchSamplerShard) and not sampler.even_batches:
            return given  # nor here: some processes have fewer pictures
        if state.remainder < 0:
            raise ValueError(
                "This loader's data set has no length, so it cannot be known which pictures of its last batch are "
                "repeated. Give the data set a __len__, or leave "
                "DataLoaderConfiguration(dispatch_batches=...) at its default, which counts streams."
            )
        samples = loader.total_batch_size // accelerator.num_processes
        if given != samples:
            raise ValueError(f"Expected one picture for each of the {samples} samples, but got {given}.")
    if not state.end_of_dataloader or state.remainder == 0:
        return given
    # accelerate counts the samples of the last round process after process.
    real: int = max(0, min(given, state.remainder - accelerator.process_index * given))
    return real
