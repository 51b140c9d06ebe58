"""Any closed question, on every class of model, against brute force: each answer written out behind the prompt."""

import math

import pytest
import torch

from vqr1_metric.backends.loading import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.protocol import QUESTIONS, VISUALQUALITY_R1, Question

SYSTEM = Question("How sharp is it?", {"1": 1, "2": 2, "3": 3, "10": 10}, opening="<answer>", closing="</answer>")
#: Answers of several tokens that begin alike, with blanks before them.
WORDS = Question(
    "What is wrong?",
    {"noise": 0.0, "not much": 1.0, "nothing": 1.5, "blur": 3.0},
    "words",
    spellings=("", " "),
    system="You judge pictures.",
)
SPOKEN = Question(
    "Say it.", {"good": 1.0, "poor": 0.0}, "spoken", "The quality is", opening_given=False, spellings=(" ",)
)
ASKED = [QUESTIONS["levels"], QUESTIONS["alignment"].about("a lake at dawn"), SYSTEM, WORDS, SPOKEN]


@pytest.fixture
def pictures():
    """Two pictures of unequal size, so that a batch of them is padded on the left."""
    return [torch.rand(3, 60, 90), torch.rand(3, 84, 56)]


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def backend(request):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    return TransformersBackend(ModelSpec(str(folder), dtype="float64", device="cpu"))


@pytest.fixture
def tolerance(backend):
    """Linear attention computes in float32 whatever the weights are."""
    return {"atol": 1e-12, "rtol": 1e-9} if backend._passes.full_attention else {"atol": 1e-6, "rtol": 1e-4}


def small(backend):
    return backend.pixel_config.with_limits(min_pixels=56 * 56)


def brute_force(backend, images, question, thinking=False):
    """P(answer | opening) of every value, and P(opening), by writing out every reply as a sequence of its own."""
    inputs = backend._inputs([images], small(backend), thinking, None, False, question)
    tokenizer = backend.tokenizer

    def log_probability(text, length):
        """Log-probability of the tokens of ``text`` that cover its first ``length`` characters, and those tokens."""
        ids = tokenizer.encode(text, add_special_tokens=False)
        count = next(n for n in range(len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= length)
        tail = torch.tensor([ids[:count]], dtype=torch.long)
        logits = backend.model(
            input_ids=torch.cat([inputs["input_ids"], tail], 1),
            attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + count, dtype=torch.long),
            mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tail, dtype=torch.int)], 1),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0, -count - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, tail.T).sum()) if count else 0.0, tuple(ids[:count])

    masses, openings = {}, {}
    for text, value in question.answers.items():
        begins_another = any(other != text and other.startswith(text) for other in question.answers)
        for spelling in question.spellings:
            for blank in {spelling, ""} if begins_another else {""}:
                reply = question.opening + spelling + text + blank
                whole = reply + question.closing
                log_mass, tokens = log_probability(whole, len(reply) + begins_another)
                masses[tokens] = (value, math.exp(log_mass))
                log_tag, tag = log_probability(whole, len(question.opening))
                openings[tag] = math.exp(log_tag)
    of_opening = sum(openings.values())
    by_value = [sum(mass for v, mass in masses.values() if v == value) / of_opening for value in question.values]
    return torch.tensor(by_value, dtype=torch.float64), of_opening


def check(distribution, expected, expected_opening, question, tolerance):
    mass = distribution.probabilities * distribution.coverage[..., None]
    torch.testing.assert_close(mass.log(), expected.log(), atol=1e-3 if tolerance["rtol"] > 1e-6 else 1e-8, rtol=0)
    opening = 1.0 if question.opening_given else expected_opening
    assert float(distribution.tag_probability) == pytest.approx(opening, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("question", ASKED, ids=lambda question: question.name)
def test_one_pass_equals_brute_force(backend, pictures, tolerance, question):
    backend.use_trie(backend._trie(question, every_spelling=True), question)
    together = backend.distributions(pictures, small(backend), question=question)
    assert together.values == question.values and together.answers == question.labels
    for i, picture in enumerate(pictures):
        check(together[i], *brute_force(backend, picture, question), question, tolerance)
    change = (together.probabilities[0].log() - together.probabilities[1].log()).abs().max()
    assert float(change) > 0.05  # the answer depends on the picture


@torch.no_grad()
def test_several_questions_about_images_encoded_once(backend, pictures, tolerance, monkeypatch):
    """Each answer is that of the question asked alone; the tower sees every image once."""
    prompts = [[QUESTIONS["alignment"].about(text) for text in ("a lake", "a very noisy picture of a lake")]]
    asked = [VISUALQUALITY_R1, *prompts, QUESTIONS["sharpness"], SYSTEM, SPOKEN]
    alone = [backend.distributions(pictures, small(backend), question=question) for question in asked]
    towers = []
    forward = backend.model.model.visual.forward
    monkeypatch.setattr(
        backend.model.model.visual, "forward", lambda *a, **k: towers.append(len(k["grid_thw"])) or forward(*a, **k)
    )
    together = backend.ask(pictures, asked, small(backend))
    if backend._passes.full_attention:
        assert towers == [2]
    for one, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(one.probabilities, expected.probabilities, **tolerance)
        torch.testing.assert_close(one.coverage, expected.coverage, **tolerance)
        torch.testing.assert_close(one.tag_probability, expected.tag_probability, **tolerance)
        assert one.values == expected.values
    other_system = backend.ask(pictures[:1], [WORDS, QUESTIONS["levels"]], small(backend))  # begin differently
    expected = backend.distributions(pictures[:1], small(backend), question=WORDS)
    torch.testing.assert_close(other_system[0].probabilities, expected.probabilities, **tolerance)


@torch.no_grad()
def test_two_images_in_one_prompt(backend, pictures, tolerance):
    question = QUESTIONS["pairwise"]
    pairs = [(pictures[0], pictures[1]), (pictures[1], pictures[0])]
    both = backend.distributions(pairs, small(backend), question=question)
    for i, pair in enumerate(pairs):
        check(both[i], *brute_force(backend, pair, question), question, tolerance)
    assert float((both.probabilities[0] - both.probabilities[1]).abs().max()) > 1e-4


@torch.no_grad()
def test_branching_on_the_cache_equals_the_tree(tiny_model, pictures):
    """The general route, for layers that take no mask, on models that take the tree too; all 401 scores."""
    backend = TransformersBackend(ModelSpec(str(tiny_model), dtype="float64", device="cpu"))
    tree = backend.distributions(pictures, small(backend))
    backend._passes.full_attention = False
    branched = backend.distributions(pictures, small(backend))
    torch.testing.assert_close(branched.probabilities, tree.probabilities, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(branched.tag_probability, tree.tag_probability, atol=1e-12, rtol=1e-9)


def test_answers_of_one_token_need_no_tree_and_pass_gradients(backend, pictures):
    trie = backend._trie(QUESTIONS["levels"])
    single = {len(backend.tokenizer.encode(" " + word)) for word in QUESTIONS["levels"].labels}
    question = Question("Good?", {"1": 1.0, "2": 2.0, "3": 3.0}, opening="Rating:")
    assert len(backend._trie(question)) == 0 and len(backend._trie(question).prefix) > 1
    assert (len(trie) == 0) == (single == {1})
    image = pictures[0].clone().requires_grad_()
    backend.distributions([image], small(backend), question=question).mean.sum().backward()
    assert float(image.grad.abs().sum()) > 0


def test_gradients_through_linear_attention_need_answers_of_one_token(tiny_qwen3_5, pictures):
    backend = TransformersBackend(ModelSpec(str(tiny_qwen3_5), dtype="float32", device="cpu"))
    image = pictures[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="answers of one token"):
        backend.distributions([image], small(backend))


@torch.no_grad()
def test_replies_of_a_model_with_linear_attention(tiny_qwen3_5, pictures):
    """The readout after reasonings, which share no pass there."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen3_5), dtype="float32", device="cpu"))
    thoughts = ["<think>Sharp, well exposed.</think>", "<think>Noise.</think>\n"]
    together = backend.distributions([pictures[0]] * 2, small(backend), replies=thoughts)
    for i, thought in enumerate(thoughts):
        alone = backend.distributions(pictures[:1], small(backend), replies=[thought])
        torch.testing.assert_close(together.probabilities[i], alone.probabilities[0], atol=1e-5, rtol=1e-3)
