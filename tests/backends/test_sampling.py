"""Random numbers of replies: they follow from the image, the seed and the reply's number, and from nothing else."""

import itertools

import numpy as np
import pytest
import torch

from vqr1_metric.backends.base import Sampling
from vqr1_metric.scorer import QualityScorer


def images(count, side=32):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8) for _ in range(count)]


def test_seeds_follow_from_pixels_seed_and_reply():
    first, second = images(2)
    sampling = Sampling(num_samples=4)
    seeds = sampling.seeds(first)
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert Sampling(num_samples=2).seeds(first) == seeds[:2]  # how many replies there are does not matter
    assert sampling.seeds(first.float() / 255) == sampling.seeds(first.double() / 255) == seeds
    assert sampling.seeds(first.mT.contiguous().mT) == seeds  # nor how the pixels lie in memory
    others = [
        sampling.seeds(second),
        Sampling(num_samples=4, seed=1).seeds(first),
        sampling.seeds(first.reshape(3, 16, 64)),
        sampling.seeds((first.float() / 255 + 2e-5).clamp(max=1)),
    ]
    for a, b in itertools.combinations([seeds, *others], 2):
        assert not {*a} & {*b}


def test_first_random_numbers_are_independent_between_images_and_replies():
    """The uniform numbers that choose tokens, over 60 images and 4 replies: no two streams are correlated."""
    seeds = [seed for image in images(60, 8) for seed in Sampling(num_samples=4).seeds(image)]
    numbers = torch.stack([torch.rand(400, generator=torch.Generator().manual_seed(s)) for s in seeds]).numpy()
    correlations = np.corrcoef(numbers)[np.triu_indices(len(seeds), 1)]
    assert abs(correlations.mean()) < 0.005 and np.abs(correlations).max() < 0.3


@pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
def test_scores_of_two_images_do_not_move_together_over_seeds():
    """What shared random numbers did: over seeds, the scores of all images rose and fell together."""
    from scipy.stats import norm

    generator = torch.Generator().manual_seed(2)
    smooth = torch.rand(10, 3, 4, 4, generator=generator)
    pictures = list(torch.nn.functional.interpolate(smooth, (64, 64), mode="bicubic").clamp(0, 1))
    seeds = 14
    scores = np.array(
        [
            [r.score for r in QualityScorer("nano", "sample", num_samples=3, seed=seed, device="cpu").score(pictures)]
            for seed in range(seeds)
        ]
    )
    assert np.isfinite(scores).all() and (scores.std(0) > 0).all()
    correlations = np.corrcoef(scores.T)[np.triu_indices(len(pictures), 1)]
    # Under independence a correlation over n seeds has a standard deviation of 1 / sqrt(n - 1).
    deviation = 1 / np.sqrt(seeds - 1) / np.sqrt(len(correlations))
    assert abs(correlations.mean()) < norm.isf(1e-5) * deviation < 0.2


@pytest.mark.parametrize("mode", ["sample", "think"])
@pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
def test_replies_are_the_same_in_every_batch_and_order(mode):
    pictures = [image.repeat(1, 2 + i, 3) for i, image in enumerate(images(4))]

    def replies(chosen, **options):
        scorer = QualityScorer("nano", mode, num_samples=2, max_new_tokens=12, device="cpu", seed=5, **options)
        return [[(r.reasoning, r.reason, str(r.score)) for r in result.replies] for result in scorer.score(chosen)]

    together = replies(pictures)
    assert len({str(texts) for texts in together}) > 1  # short replies to two images may say the same
    assert [replies([image])[0] for image in pictures] == together
    assert replies(pictures[::-1]) == together[::-1]
    assert replies(pictures, batch_tokens=1) == replies(pictures, batch_tokens=100_000) == together
    assert replies([pictures[2], pictures[0], pictures[2]]) == [together[2], together[0], together[2]]
