"""`QualityScorer`: order, batches, modes, seeds, copies; on real tiny models."""

import copy
import math
import pickle

import pytest
import torch

from tiny_models import build_tiny_model
from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.batches import Batches
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional import ScoreDistribution
from vqr1_metric.functional.distribution import GRID_SIZE
from vqr1_metric.images import ImageError
from vqr1_metric.protocol import VISUALQUALITY_R1
from vqr1_metric.results import Comparison, ImageScore, rank_results
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def scorer(tiny_qwen2_5_vl):
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32")


def pictures(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, h, w, generator=generator) for h, w in sizes]


SIZES = [(100, 80), (56, 56), (30, 200), (170, 150), (1, 1), (84, 84), (56, 56)]


def test_scores_are_in_input_order_whatever_the_batches(scorer, tiny_qwen2_5_vl):
    images = pictures(*SIZES)
    together = [r.score for r in scorer.score(images)]
    alone = [scorer.score(image)[0].score for image in images]
    tight = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32", batch_tokens=1).score(images)
    assert together == pytest.approx(alone, abs=2e-5)
    assert [r.score for r in tight] == alone
    assert len({round(s, 4) for s in alone}) > 4
    assert all(1 <= s <= 5 for s in alone)
    assert [r.name for r in scorer.score(images)] == [f"image {i}" for i in range(len(images))]


def test_same_picture_same_score_whatever_its_batch_mates(tiny_qwen2_5_vl):
    """float64: equal to rounding, so what is left in float32 and bfloat16 is arithmetic, not a leak between
    pictures.
    """
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float64")
    images = pictures(*SIZES)
    together = scorer.distributions(images).mean
    alone = torch.cat([scorer.distributions(image).mean for image in images])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


def test_deterministic(scorer):
    images = pictures(*SIZES)
    assert [r.score for r in scorer.score(images)] == [r.score for r in scorer.score(images)]


def planned(scorer, images):
    """The batches that the scorer would make of images."""
    visual = [scorer.pixel_config.visual_tokens(*image.shape[-2:]) for image in images]
    lengths = [scorer.backend.sequence_length(tokens, False) for tokens in visual]
    return Batches().plan(scorer.backend, lengths, visual, tokens=scorer.batch_tokens)


def test_batches_respect_the_token_budget(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", batch_tokens=1500)
    images = pictures(*SIZES)
    batches = list(planned(scorer, images))
    assert sorted(i for batch in batches for i in batch) == list(range(len(images)))
    for batch in batches:
        lengths = [
            scorer.backend.sequence_length(scorer.pixel_config.visual_tokens(*images[i].shape[-2:]), False)
            for i in batch
        ]
        assert len(batch) == 1 or max(lengths) * len(batch) <= 1500
    assert 1 < len(batches) < len(images)


def test_unequal_pictures_are_not_padded_much(tiny_qwen2_5_vl):
    """Padding of the language model's rows below 5 %, where one batch for all would be a third padding."""
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", batch_tokens=16_384)
    images = [torch.zeros(3, side, side, dtype=torch.uint8) for side in (224, 448, 672) for _ in range(6)]
    lengths = [scorer.backend.sequence_length(scorer.pixel_config.visual_tokens(*x.shape[-2:]), False) for x in images]
    batches = [[lengths[i] for i in batch] for batch in planned(scorer, images)]
    rows = sum(len(batch) * max(batch) for batch in batches)
    assert 1 < len(batches) <= 3
    assert 1 - sum(lengths) / rows < 0.05 < 0.3 < 1 - sum(lengths) / (len(lengths) * max(lengths))


def test_one_forward_pass_per_batch(scorer, monkeypatch):
    scorer.batch_tokens = 10_000
    scorer.score(pictures((56, 56)))  # loads and calibrates
    calls = []
    model = scorer.backend.model.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kwargs: calls.append(len(kwargs["input_ids"])) or forward(**kwargs))
    scorer.score(pictures((56, 56), (56, 84), (84, 84)))
    assert calls == [3]


def test_bad_pictures_lose_nothing_else(scorer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    good = pictures((60, 60), (90, 60))
    results = scorer.score([good[0], tmp_path / "broken.png", tmp_path / "missing.png", good[1]])
    assert [math.isnan(r.score) for r in results] == [False, True, True, False]
    assert "broken.png" in results[1].error and "no such file" in results[2].error
    assert [results[0].score, results[3].score] == pytest.approx([r.score for r in scorer.score(good)], abs=2e-5)
    with pytest.raises(ImageError, match=r"missing\.png"):
        scorer.score([good[0], tmp_path / "missing.png"], on_error="raise")
    with pytest.raises(ValueError, match="on_error"):
        scorer.score(good, on_error="ignore")


def test_streams_without_reading_ahead(scorer):
    read = []

    def images():
        for image in pictures(*[(56, 56)] * 130):
            read.append(1)
            yield image

    results = scorer.stream(images())
    next(results)
    assert len(read) == 64
    assert 1 + sum(1 for _ in results) == 130


def test_nothing_to_score(scorer):
    assert scorer.score([]) == []
    assert list(scorer.stream(iter(()))) == []
    with pytest.raises(ImageError, match="at least one picture"):
        scorer.distributions([])


def test_limits_change_what_the_model_sees(tiny_qwen2_5_vl):
    image = pictures((200, 200))
    full = QualityScorer(str(tiny_qwen2_5_vl), device="cpu").score(image)[0].score
    small = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", max_pixels=56 * 56).score(image)[0].score
    assert full != small


def test_think_mixes_the_distributions_of_its_reasonings(tiny_qwen2_5_vl, monkeypatch):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), "think", device="cpu", num_samples=3)
    texts = ["<think>Sharp.</think><answer>4.1</answer>", "<think>Blurred.</think>\n", "<think>endless"]
    backend = scorer.backend
    monkeypatch.setattr(backend, "sample_replies", lambda images, *a, **k: [texts] * len(images))
    image = pictures((56, 84))
    result = scorer.score(image)[0]
    prefixes = ["<think>Sharp.</think>", "<think>Blurred.</think>\n"]
    with torch.no_grad():
        expected = backend.distributions(image * 2, scorer.pixel_config, replies=prefixes)
    assert result.score == pytest.approx(float(expected.mean.mean()), abs=1e-5)
    torch.testing.assert_close(result.distribution.probabilities, expected.probabilities.mean(0))
    assert [r.reasoning for r in result.replies[:2]] == ["Sharp.", "Blurred."]
    assert [r.score for r in result.replies[:2]] == pytest.approx(expected.mean.tolist(), abs=1e-5)
    assert math.isnan(result.replies[2].score) and "did not come to an end" in result.replies[2].reason


def test_think_without_any_finished_reasoning_has_no_score(tiny_qwen2_5_vl):
    result = QualityScorer(str(tiny_qwen2_5_vl), "think", device="cpu", num_samples=2, max_new_tokens=3).score(
        pictures((56, 56))
    )[0]
    assert math.isnan(result.score) and "none of 2 sampled reasonings" in result.error and len(result.replies) == 2


def test_sample_parses_replies_and_leaves_out_what_cannot_be_read(tiny_qwen2_5_vl, monkeypatch):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), "sample", device="cpu", num_samples=4, batch_tokens=10_000)
    replies = [["<answer>3.10</answer>", "<answer>3.50</answer>", "<answer>9</answer>", "good"], ["bad"] * 4]
    asked = []

    def sample_replies(images, config, sampling, *, thinking, add_vision_id):
        asked.append((thinking, add_vision_id))
        return replies

    monkeypatch.setattr(scorer.backend, "sample_replies", sample_replies)
    first, second = scorer.score(pictures((56, 56), (56, 56)))
    assert first.score == pytest.approx(3.3) and first.coverage == 0.5 and first.tag_probability == 0.75
    assert [r.reason for r in first.replies] == [
        None,
        None,
        "the score 9 lies outside 1 to 5",
        "the reply has no <answer>...</answer>",
    ]
    assert math.isnan(second.score) and "none of 4 sampled replies held a score" in second.error
    assert asked == [(False, True)]  # "Picture 1: " is written, as in the authors' scripts


def test_vision_id_is_in_the_prompt_only_when_asked_for(scorer):
    backend = scorer.backend
    without, with_id = (
        backend.tokenizer.decode(backend._prompts.segments(VISUALQUALITY_R1, False, flag)[0]) for flag in (False, True)
    )
    assert "Picture 1: " in with_id and "Picture 1: " not in without


def test_replies_depend_on_picture_and_seed_alone(tiny_qwen2_5_vl):
    options = {"device": "cpu", "num_samples": 2, "max_new_tokens": 8}
    a, b = pictures((56, 56), (84, 112))
    scorer = QualityScorer(str(tiny_qwen2_5_vl), "sample", **options)
    texts = lambda results: [[r.reasoning for r in result.replies] for result in results]  # noqa: E731
    alone = texts(scorer.score(a)) + texts(scorer.score(b))
    assert texts(scorer.score([b, a])) == alone[::-1]
    assert texts(QualityScorer(str(tiny_qwen2_5_vl), "sample", seed=1, **options).score(a)) != alone[:1]
    assert alone[0][0] != alone[0][1]


def test_a_generation_config_of_the_checkpoint_has_no_say(tiny_qwen2_5_vl):
    """The tiny model carries nearly greedy settings, as Qwen's do; sampled replies must differ all the same."""
    scorer = QualityScorer(str(tiny_qwen2_5_vl), "sample", device="cpu", num_samples=8, max_new_tokens=4)
    assert scorer.backend.model.generation_config.temperature < 0.01
    result = scorer.score(pictures((56, 56)))[0]
    assert len({reply.reasoning for reply in result.replies}) > 4


def test_low_reliability_warns_once_and_is_visible(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu")
    with pytest.warns(UserWarning, match="answer tag") as caught:
        results = scorer.score(pictures((56, 56), (56, 56))) + scorer.score(pictures((84, 56)))
    assert len(caught) == 1
    assert not any(r.reliable for r in results)
    assert all(0 <= r.coverage <= 1 and 0 <= r.tag_probability <= 1 for r in results)


def peak(score, width=3):
    probabilities = torch.zeros(GRID_SIZE)
    probabilities[round((score - 1) * 100) - width : round((score - 1) * 100) + width + 1] = 1 / (2 * width + 1)
    return ImageScore.of(f"{score}", ScoreDistribution(probabilities))


def test_compare_and_rank():
    results = [peak(2.0), peak(4.0), ImageScore.failed("x", "broken"), peak(3.0, 50), peak(2.99, 60)]
    ranked = rank_results(results)
    assert [r.index for r in ranked] == [1, 3, 4, 0, 2]
    assert [r.rank for r in ranked] == [1, 2, 2, 4, None]
    assert [r.tied for r in ranked] == [False, True, True, False, False]
    assert ranked[0].beats_next == pytest.approx(1) and ranked[-1].beats_next is None and ranked[3].beats_next is None
    assert Comparison.of(results[1], results[0]).winner == "a"
    assert Comparison.of(results[0], results[1]).winner == "b"
    assert Comparison.of(results[3], results[4]).winner == "tie"
    assert Comparison.of(results[0], results[2]).winner is None


def test_compare_agrees_with_score(scorer):
    a, b = pictures((60, 60), (90, 60))
    comparison = scorer.compare(a, b)
    assert comparison.win_probability == pytest.approx(1 - scorer.compare(b, a).win_probability, abs=1e-5)
    assert comparison.a.score == pytest.approx(scorer.score(a)[0].score, abs=2e-5)


def test_explain_falls_back_to_the_one_pass_score(scorer):
    image = pictures((56, 56))[0]
    scorer.sampling = type(scorer.sampling)(num_samples=2, max_new_tokens=3)
    result = scorer.explain(image)
    assert result.error is None and result.score == scorer.score(image)[0].score
    assert all("did not come to an end" in reply.reason for reply in result.replies)


def test_copies_share_the_weights_and_pickles_hold_the_recipe(scorer):
    images = pictures((56, 56))
    score = scorer.score(images)[0].score
    assert copy.deepcopy(scorer) is scorer and copy.copy(scorer) is scorer
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again.backend is scorer.backend and again.score(images)[0].score == score


def test_a_scorer_with_a_ready_backend_pickles_its_recipe_too(tiny_qwen2_5_vl):
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), device="cpu"))
    scorer = QualityScorer(backend=backend)
    assert copy.deepcopy(backend) is backend
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 2000
    images = pictures((56, 56))
    assert pickle.loads(pickled).score(images)[0].score == scorer.score(images)[0].score
    in_memory = TransformersBackend(backend._spec, load_model(backend._spec))
    with pytest.raises(TypeError, match="save them to a folder"):
        pickle.dumps(in_memory)


def test_unload_frees_and_the_next_use_loads_again(tmp_path):
    import gc
    import weakref

    folder = build_tiny_model(tmp_path, "qwen2_vl", seed=7)  # weights of its own: others may have been loaded before
    scorer = QualityScorer(str(folder), device="cpu")
    assert not scorer.loaded
    score = scorer.score(pictures((56, 56)))[0].score
    weights = weakref.ref(scorer.backend.model)
    assert scorer.loaded
    scorer.offload()  # on the CPU already: nothing to move
    scorer.unload()
    gc.collect()
    assert weights() is None and not scorer.loaded
    assert scorer.score(pictures((56, 56)))[0].score == score


def test_fingerprint_tells_configurations_apart(tiny_qwen2_5_vl):
    name = str(tiny_qwen2_5_vl)
    variants = [
        QualityScorer(name),
        QualityScorer(name, "think"),
        QualityScorer(name, "think", seed=1),
        QualityScorer(name, max_pixels=10_000),
        QualityScorer("nano"),
        QualityScorer(name, dtype="float64"),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert QualityScorer(name).fingerprint == QualityScorer(name, batch_tokens=7).fingerprint
    assert all(0 <= v.fingerprint < 2**48 for v in variants)


def test_autocast_around_it_changes_nothing(scorer):
    images = pictures((84, 84))
    plain = scorer.score(images)[0].score
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.score(images)[0].score == plain


def test_gradients_reach_the_pixels_and_not_the_weights(scorer):
    images = torch.stack(pictures((56, 84), (56, 84))).requires_grad_()
    scorer.distributions(images, differentiable=True).mean.sum().backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for p in scorer.backend.model.parameters())
    with pytest.warns(UserWarning, match="differentiable=True"):
        assert not scorer.distributions(images).probabilities.requires_grad


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode to be one of"):
        QualityScorer("nano", "guess")
    with pytest.raises(ValueError, match="batch_tokens"):
        QualityScorer("nano", batch_tokens=0)
    with pytest.raises(ValueError, match="num_samples"):
        QualityScorer("nano", num_samples=0)
    with pytest.raises(ValueError, match="temperature > 0"):
        QualityScorer("nano", temperature=0)
    with pytest.raises(ModelError, match="dtype"):
        QualityScorer("nano", dtype="float8")
