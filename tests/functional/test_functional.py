"""The pure maths, against SciPy, plain Python loops and the published formulas."""

import math
import subprocess
import sys

import pytest
import torch
from scipy import stats

from vqr1_metric.functional import (
    ScoreDistribution,
    comparison_probability,
    fidelity,
    preference_label,
    ranking_reward,
    score_grid,
    win_probability,
)
from vqr1_metric.functional.reward import EPSILON
from vqr1_metric.functional.thurstone import GAMMA
from vqr1_metric.protocol import parse_reply


def random_distribution(*shape):
    return ScoreDistribution(torch.randn(*shape, 401, dtype=torch.float64).mul(3).softmax(-1))


class TestScoreDistribution:
    def test_grid(self):
        grid = score_grid(dtype=torch.float64)
        assert len(grid) == 401 and grid[0] == 1 and grid[-1] == 5
        torch.testing.assert_close(grid[242], torch.tensor(3.42, dtype=torch.float64))

    def test_moments_and_quantiles_against_scipy(self):
        dist = random_distribution()
        reference = stats.rv_discrete(values=(range(401), dist.probabilities.numpy()))
        assert float(dist.mean) == pytest.approx(1 + reference.mean() / 100, abs=1e-9)
        assert float(dist.std) == pytest.approx(reference.std() / 100, abs=1e-9)
        for q in (0.01, 0.025, 0.5, 0.9, 0.975):
            assert float(dist.quantile(q)) == pytest.approx(1 + reference.ppf(q) / 100)
        low, high = dist.interval(0.9)
        assert float(low) == pytest.approx(1 + reference.ppf(0.05) / 100)
        assert float(high) == pytest.approx(1 + reference.ppf(0.95) / 100)

    def test_quantile_edges(self):
        point = ScoreDistribution(torch.nn.functional.one_hot(torch.tensor(242), 401).double())
        assert [float(point.quantile(q)) for q in (0, 0.5, 1)] == pytest.approx([3.42] * 3)
        assert float(random_distribution().to(torch.float32).quantile(1.0)) == pytest.approx(5.0)
        with pytest.raises(ValueError, match="quantile in"):
            point.quantile(1.5)

    def test_mode(self):
        probabilities = torch.full((401,), 0.5 / 400)
        probabilities[150] = 0.5
        assert float(ScoreDistribution(probabilities).mode) == pytest.approx(2.5)

    def test_bounds(self):
        for index, score in ((0, 1.0), (400, 5.0)):
            point = ScoreDistribution(torch.nn.functional.one_hot(torch.tensor(index), 401).float())
            assert float(point.mean) == score and float(point.std) == 0

    def test_log_probabilities_far_outside_the_grammar_stay_finite(self):
        log_probabilities = torch.randn(2, 401) - 200
        dist = ScoreDistribution.from_log_probabilities(log_probabilities)
        torch.testing.assert_close(dist.probabilities.sum(-1), torch.ones(2))
        assert bool((dist.coverage == 0).all()) and bool(torch.isfinite(dist.mean).all())

    def test_samples_keep_their_mean_and_count_what_is_missing(self):
        dist = ScoreDistribution.from_samples(torch.tensor([3.456, 4.0, math.nan, 1.0], dtype=torch.float64))
        assert float(dist.mean) == pytest.approx((3.456 + 4 + 1) / 3)
        assert float(dist.coverage) == pytest.approx(0.75)
        assert float(dist.probabilities.sum()) == pytest.approx(1)
        nothing = ScoreDistribution.from_samples(torch.tensor([math.nan, math.nan]))
        assert math.isnan(float(nothing.mean)) and float(nothing.coverage) == 0
        assert float(ScoreDistribution.from_samples(torch.tensor([5.0])).mean) == 5
        with pytest.raises(ValueError, match=r"Expected scores in \[1, 5\]"):
            ScoreDistribution.from_samples(torch.tensor([6.0]))

    def test_mixture_is_the_average_and_leaves_nan_out(self):
        batch = random_distribution(3)
        mixed = batch.mixture()
        torch.testing.assert_close(mixed.probabilities, batch.probabilities.mean(0))
        # Law of total variance.
        expected = batch.variance.mean() + batch.mean.var(unbiased=False)
        torch.testing.assert_close(mixed.variance, expected)
        probabilities = batch.probabilities.clone()
        probabilities[1] = math.nan
        partial = ScoreDistribution(probabilities, torch.tensor([0.5, 9, 0.7], dtype=torch.float64)).mixture()
        torch.testing.assert_close(partial.probabilities, batch.probabilities[[0, 2]].mean(0))
        assert float(partial.coverage) == pytest.approx(0.6)
        assert bool(ScoreDistribution(torch.full((2, 401), math.nan)).mixture().mean.isnan())

    def test_no_score_stays_nan_everywhere(self):
        nothing = ScoreDistribution(torch.full((401,), math.nan))
        assert all(math.isnan(float(v)) for v in (nothing.mean, nothing.std, nothing.quantile(0.5), nothing.mode))
        assert "no score" in repr(nothing)

    def test_stack_index_length(self):
        a, b = random_distribution(), random_distribution()
        both = ScoreDistribution.stack([a, b])
        assert len(both) == 2 and torch.equal(both[1].probabilities, b.probabilities)
        assert [len(part.probabilities) for part in both] == [401, 401]
        with pytest.raises(TypeError):
            len(a)
        with pytest.raises(ValueError, match="at least one"):
            ScoreDistribution.stack([])

    def test_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 401\)"):
            ScoreDistribution(torch.rand(5))
        with pytest.raises(ValueError, match="coverage of shape"):
            ScoreDistribution(torch.rand(2, 401), torch.rand(3))

    def test_mean_is_differentiable(self):
        logits = torch.randn(401, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: ScoreDistribution.from_log_probabilities(x.log_softmax(-1) - 1).mean, logits
        )


class TestThurstone:
    def test_against_scipy(self):
        means, variances = torch.rand(2, 50, dtype=torch.float64) * 4 + 1, torch.rand(2, 50, dtype=torch.float64)
        got = comparison_probability(means[0], variances[0], means[1], variances[1])
        expected = stats.norm.cdf((means[0] - means[1]) / (variances[0] + variances[1] + 1e-6).sqrt())
        torch.testing.assert_close(got, torch.from_numpy(expected))

    def test_edges(self):
        one, zero = torch.tensor(1.0), torch.tensor(0.0)
        assert float(comparison_probability(one, zero, one, zero)) == 0.5  # gamma keeps 0/0 away
        assert float(comparison_probability(one * 5, zero, one, zero)) == 1
        assert GAMMA == 1e-6

    def test_win_probability_is_exact(self):
        a, b = random_distribution(), random_distribution()
        expected = sum(
            float(a.probabilities[s]) * (float(b.probabilities[:s].sum()) + 0.5 * float(b.probabilities[s]))
            for s in range(401)
        )
        assert float(win_probability(a, b)) == pytest.approx(expected)
        assert float(win_probability(a, b) + win_probability(b, a)) == pytest.approx(1)
        assert float(win_probability(a, a)) == pytest.approx(0.5)

    def test_win_probability_nears_the_normal_formula(self):
        grid = score_grid(dtype=torch.float64)
        a, b = (ScoreDistribution(torch.from_numpy(stats.norm.pdf(grid, mu, 0.3)).div(100)) for mu in (3.2, 2.9))
        normal = comparison_probability(a.mean, a.variance, b.mean, b.variance)
        assert float(win_probability(a, b)) == pytest.approx(float(normal), abs=1e-3)

    def test_no_score_has_no_winner(self):
        nothing = ScoreDistribution(torch.full((401,), math.nan, dtype=torch.float64))
        assert math.isnan(float(win_probability(nothing, random_distribution())))


class TestFidelity:
    def test_formula_and_edges(self):
        p, label = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0.0, 0.5, 1.0])
        expected = (p * label).sqrt() + ((1 - p) * (1 - label)).sqrt()
        torch.testing.assert_close(fidelity(p, label, eps=0), expected)
        assert EPSILON == 1e-6
        assert float(fidelity(torch.tensor(1.0), torch.tensor(1.0))) == pytest.approx(1.001, abs=1e-4)
        assert float(fidelity(torch.tensor(0.5), torch.tensor(1.0))) == pytest.approx(0.708, abs=1e-3)

    def test_gradient_is_finite_at_the_edges(self):
        p = torch.tensor([0.0, 1.0], requires_grad=True)
        fidelity(p, torch.tensor([1.0, 0.0])).sum().backward()
        assert bool(torch.isfinite(p.grad).all())

    def test_preference_label(self):
        label = preference_label(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))
        assert label.tolist() == [0, 0.5, 1]


def reward_by_loops(scores, mos, gamma, eps, variance="estimated"):
    """The published formula written out, leaving NaN scores out."""
    kept = [[s for s in row if not math.isnan(s)] for row in scores]
    mean = [sum(row) / len(row) if row else None for row in kept]
    var = [
        1.0 if variance == "fixed" else sum((s - m) ** 2 for s in row) / (len(row) - 1) if len(row) > 1 else 0.0
        for row, m in zip(kept, mean, strict=True)
    ]
    out = []
    for i, row in enumerate(scores):
        partners = [j for j in range(len(mos)) if j != i and kept[j]]
        rewards = []
        for q in row:
            if math.isnan(q) or not partners:
                rewards.append(math.nan)
                continue
            total = 0.0
            for j in partners:
                p = stats.norm.cdf((q - mean[j]) / math.sqrt(var[i] + var[j] + gamma))
                label = 1.0 if mos[i] > mos[j] else 0.5 if mos[i] == mos[j] else 0.0
                total += math.sqrt(p * label + eps) + math.sqrt((1 - p) * (1 - label) + eps)
            rewards.append(total / len(partners))
        out.append(rewards)
    return torch.tensor(out, dtype=torch.float64)


class TestRankingReward:
    @pytest.mark.parametrize("variance", ["estimated", "fixed"])
    def test_against_the_formula_written_out(self, variance):
        scores = (torch.rand(8, 6, dtype=torch.float64) * 4 + 1).mul(100).round().div(100)
        mos = torch.tensor([1.0, 5, 3, 3, 2, 4.5, 60, 0])
        scores[0, 2] = scores[3, 0] = math.nan
        scores[4] = math.nan
        scores[5, 1:] = math.nan
        got = ranking_reward(scores, mos, variance=variance)
        expected = reward_by_loops(scores.tolist(), mos.tolist(), GAMMA, EPSILON, variance)
        torch.testing.assert_close(got, expected, equal_nan=True)

    def test_identical_scores_earn_the_plateau(self):
        reward = ranking_reward(torch.full((4, 6), 3.0), torch.tensor([1.0, 2, 3, 4]))
        assert reward.mean().item() == pytest.approx(0.708, abs=1e-3)

    def test_a_picture_alone_has_no_reward(self):
        assert bool(ranking_reward(torch.rand(1, 6) + 1, torch.tensor([1.0])).isnan().all())

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"scores of shape \(B, K\)"):
            ranking_reward(torch.rand(3), torch.rand(3))
        with pytest.raises(ValueError, match="finite MOS"):
            ranking_reward(torch.rand(2, 2) + 1, torch.tensor([1.0, math.nan]))
        with pytest.raises(ValueError, match="variance"):
            ranking_reward(torch.rand(2, 2) + 1, torch.rand(2), variance="other")


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "score"),
        [
            ("<answer>3.42</answer>", 3.42),
            ("<answer> 4 </answer>", 4.0),
            ("<think>1</think>\n<answer>\n2.5\n</answer>", 2.5),
            ("<answer>1</answer> no, <answer>2.00</answer>", 2.0),
            ("<answer>Score: 3.7/5</answer>", 3.7),
            ("<answer>5.00</answer>", 5.0),
        ],
    )
    def test_scores(self, text, score):
        parsed = parse_reply(text)
        assert parsed.score == score and parsed.reason is None

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "no <answer>"),
            ("3.5", "no <answer>"),
            ("<answer>3.5", "no <answer>"),
            ("<answer>good</answer>", "no number"),
            ("<answer></answer>", "no number"),
            ("<answer>0.5</answer>", "0.5 lies outside"),
            ("<answer>-3</answer>", "-3 lies outside"),
            ("<answer>5.01</answer>", "5.01 lies outside"),
            ("<answer>99999999999999999999</answer>", "outside"),
        ],
    )
    def test_what_cannot_be_read_is_nan_with_a_reason(self, text, reason):
        parsed = parse_reply(text)
        assert math.isnan(parsed.score) and reason in parsed.reason

    def test_reasoning(self):
        assert parse_reply("<think> It is\nsharp. </think><answer>4</answer>").reasoning == "It is\nsharp."
        assert parse_reply("Sharp. <answer>4</answer>").reasoning == "Sharp."
        assert parse_reply("<think>cut off").reasoning == "cut off"


def test_functional_imports_torch_and_the_standard_library_only():
    """torch itself may import NumPy; nothing else of ours or of third parties may be loaded."""
    code = (
        "import sys, torch; before = set(sys.modules); import vqr1_metric.functional;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - sys.stdlib_module_names - {'vqr1_metric', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_distribution_over_other_answers():
    """Mean, spread, entropy and quantiles of a question with three answers, by hand."""
    logs = torch.tensor([[0.1, 0.2, 0.5], [0.3, 0.0, 0.0]], dtype=torch.float64).log()
    d = ScoreDistribution.from_log_probabilities(logs, values=(0.0, 1.0, 4.0), answers=("no", "partly", "yes"))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    torch.testing.assert_close(d.probabilities[0], p)
    torch.testing.assert_close(d.coverage, torch.tensor([0.8, 0.3], dtype=torch.float64))
    assert d.mean.tolist() == pytest.approx([22 / 8, 0])
    assert float(d.variance[0]) == pytest.approx(82 / 8 - (22 / 8) ** 2)
    assert float(d.entropy[0]) == pytest.approx(-float((p * p.log()).sum())) and float(d.entropy[1]) == 0
    assert float(d[0].mode) == 4 and [float(x) for x in d[0].interval(0.5)] == [1.0, 4.0]
    assert d[0].answers == ("no", "partly", "yes") and "yes=0.625" in repr(d[0])
    mixed = d.mixture()
    torch.testing.assert_close(mixed.probabilities, d.probabilities.mean(0))
    assert mixed.values == (0.0, 1.0, 4.0) and d.to(torch.float32).values == mixed.values
    assert ScoreDistribution.stack([d[0], d[1]]).answers == d.answers
    with pytest.raises(ValueError, match="same answers"):
        ScoreDistribution.stack([d[0], ScoreDistribution(p, values=(0.0, 1.0, 3.0))])
    with pytest.raises(ValueError, match="same scores"):
        win_probability(d[0], ScoreDistribution(p, values=(0.0, 1.0, 3.0)))
    with pytest.raises(ValueError, match="Expected values among"):
        d.on_score_grid()
    with pytest.raises(ValueError, match="increasing order"):
        ScoreDistribution(p, values=(0.0, 4.0, 1.0))


def test_words_with_values_from_1_to_5_are_scores_like_any_other():
    logs = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.1], [math.nan] * 5]).log().requires_grad_()
    words = ScoreDistribution.from_log_probabilities(logs, values=(1.0, 2.0, 3.0, 4.0, 5.0))
    grid = words.on_score_grid()
    assert grid.values is None and grid.probabilities.shape == (2, 401)
    torch.testing.assert_close(grid[0].mean, words[0].mean)
    torch.testing.assert_close(grid[0].variance, words[0].variance)
    torch.testing.assert_close(grid.coverage, words.coverage, equal_nan=True)
    assert bool(grid.probabilities[1].isnan().all())
    gradient, expected = (torch.autograd.grad(d[0].mean, logs, retain_graph=True)[0][0] for d in (grid, words))
    torch.testing.assert_close(gradient, expected)
