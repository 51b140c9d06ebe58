"""Golden numbers of RL2R, straight from the published formulas, one number at a time, with the standard library only.

    python tests/parity/make_rl2r.py > tests/parity/rl2r.json

Formulas: arXiv 2505.14460 (Thurstone comparison, fidelity reward, group advantage, clipped surrogate with the k3 KL
penalty), constants of the authors' code: 1e-6 under the variance and inside each root, unbiased variance and standard
deviation, 1e-4 beside the latter, the format reward added unweighted, token losses averaged over a reply and then over
replies. The gradient is that of the surrogate at the sampling policy, where every ratio is 1: with respect to the
log-probability of token t of reply o it is -(A - beta (exp(ref - new) - 1)) / |o| / (number of replies).
"""

import json
import math
import random
import sys

GAMMA = EPSILON = 1e-6
STD_EPSILON = 1e-4
BETA = 0.04


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def mean(values):
    return sum(values) / len(values)


def variance(values):
    return sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)


def reward(scores, mos, i, k):
    """Fidelity reward of score k of picture i."""
    total = 0.0
    for j in range(len(mos)):
        if j == i:
            continue
        spread = math.sqrt(variance(scores[i]) + variance(scores[j]) + GAMMA)
        predicted = normal_cdf((scores[i][k] - mean(scores[j])) / spread)
        label = 1.0 if mos[i] > mos[j] else 0.5 if mos[i] == mos[j] else 0.0
        total += math.sqrt(predicted * label + EPSILON) + math.sqrt((1 - predicted) * (1 - label) + EPSILON)
    return total / (len(mos) - 1)


def case(seed, pictures, replies):
    """Scores and MOS of one comparison set (ties among both, picture 1 says the same in every reply), and the rest."""
    draw = random.Random(seed)
    mos = [round(draw.uniform(0, 100)) / 10 for _ in range(pictures)]
    mos[-1] = mos[0]
    scores = [[round(draw.uniform(1, 5), 2) for _ in range(replies)] for _ in range(pictures)]
    scores[1] = [scores[1][0]] * replies
    formed = [[float(draw.random() < 0.8) for _ in range(replies)] for _ in range(pictures)]
    rewards = [[reward(scores, mos, i, k) for k in range(replies)] for i in range(pictures)]
    advantages = []
    for earned, form in zip(rewards, formed, strict=True):
        both = [r + f for r, f in zip(earned, form, strict=True)]
        advantages.append([(b - mean(both)) / (math.sqrt(variance(both)) + STD_EPSILON) for b in both])
    lengths = [[draw.randint(1, 5) for _ in range(replies)] for _ in range(pictures)]
    new = [[[-draw.uniform(0.01, 3) for _ in range(n)] for n in row] for row in lengths]
    reference = [[[lp + draw.gauss(0, 0.3) for lp in one] for one in row] for row in new]
    loss, gradient = 0.0, []
    for i in range(pictures):
        for k in range(replies):
            token_losses, token_gradients = [], []
            for lp, ref in zip(new[i][k], reference[i][k], strict=True):
                kl = math.exp(ref - lp) - (ref - lp) - 1
                token_losses.append(-(advantages[i][k] - BETA * kl))
                token_gradients.append(-(advantages[i][k] - BETA * (1 - math.exp(ref - lp))))
            loss += mean(token_losses) / (pictures * replies)
            gradient.append([g / len(token_gradients) / (pictures * replies) for g in token_gradients])
    return {
        "seed": seed,
        "scores": scores,
        "mos": mos,
        "format": formed,
        "rewards": rewards,
        "advantages": advantages,
        "new": new,
        "reference": reference,
        "loss": loss,
        "gradient": gradient,
    }


if __name__ == "__main__":
    cases = [case(0, 8, 6), case(1, 2, 2), case(2, 5, 4)]
    json.dump({"command": "python tests/parity/make_rl2r.py > tests/parity/rl2r.json", "cases": cases}, sys.stdout)
    print()
