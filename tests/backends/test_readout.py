"""The one-pass readout against brute force, against sampled replies, and with each known trap sprung."""

import math

import pytest
import torch

from vqr1_metric.backends import readout
from vqr1_metric.backends.base import Sampling
from vqr1_metric.backends.loading import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional.distribution import GRID_SIZE
from vqr1_metric.protocol import parse_reply


@pytest.fixture
def pictures():
    """Three pictures of unequal size, so that a batch of them is padded on the left."""
    return [torch.rand(3, 60, 90), torch.rand(3, 84, 56), torch.rand(3, 110, 100)]


@pytest.fixture
def backend(tiny_model):
    return TransformersBackend(ModelSpec(str(tiny_model), dtype="float64", device="cpu"))


def small(backend):
    """The model's preprocessing, without enlarging pictures to Qwen3-VL's least size: brute force has to see each."""
    return backend.pixel_config.with_limits(min_pixels=56 * 56)


def reply_paths(tokenizer, spellings):
    """Token ids of every reply of the grammar up to where its score is decided: {ids: (score index, ids of the
    tag)}.
    """
    paths = {}
    for spelling in spellings:
        for text, score in readout.score_texts():
            for blank in {spelling, ""} if len(text) < 4 else {""}:
                reply = f"<answer>{spelling}{text}{blank}</answer>"
                end = len("<answer>" + spelling + text) if len(text) == 4 else reply.index("</") + 1
                ids = tokenizer.encode(reply, add_special_tokens=False)

                def cut(length, ids=ids):
                    return next(n for n in range(len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= length)

                paths[tuple(ids[: cut(end)])] = (score, tuple(ids[: cut(len("<answer>"))]))
    return paths


def brute_force(backend, pictures, spellings, replies=None):
    """P(score | tag) and P(tag), by writing each beginning of a reply out behind the prompt as a sequence of its
    own.
    """
    inputs = backend._inputs(pictures, small(backend), replies is not None, replies, False)
    patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
    paths = reply_paths(backend.tokenizer, spellings)
    beginnings = sorted({ids[:n] for ids in paths for n in range(len(ids))}, key=len)
    longest = len(beginnings[-1])
    tails = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in beginnings])
    masses, tag_masses = [], []
    for row in range(len(pictures)):
        log_probs = {}
        for start in range(0, len(beginnings), 64):
            tail, chunk = tails[start : start + 64], beginnings[start : start + 64]
            prompt, mask, types = (
                inputs[name][row].expand(len(chunk), -1)
                for name in ("input_ids", "attention_mask", "mm_token_type_ids")
            )
            logits = backend.model(
                input_ids=torch.cat([prompt, tail], 1),
                attention_mask=torch.cat([mask, torch.ones_like(tail)], 1),
                mm_token_type_ids=torch.cat([types, torch.zeros_like(tail)], 1),
                pixel_values=patches[row].repeat(len(chunk), 1),
                image_grid_thw=inputs["image_grid_thw"][row].expand(len(chunk), -1),
            ).logits
            last = prompt.shape[1] - 1
            for i, ids in enumerate(chunk):
                log_probs[ids] = logits[i, last + len(ids)].log_softmax(-1)

        def log_mass(ids, log_probs=log_probs):
            return sum(float(log_probs[ids[:n]][ids[n]]) for n in range(len(ids)))

        tag_mass = sum(math.exp(log_mass(tag)) for tag in {tag for _, tag in paths.values()})
        mass = torch.zeros(GRID_SIZE, dtype=torch.float64)
        for ids, (score, _) in paths.items():
            mass[score] += math.exp(log_mass(ids)) / tag_mass
        masses.append(mass)
        tag_masses.append(tag_mass)
    return torch.stack(masses), torch.tensor(tag_masses, dtype=torch.float64)


def test_one_pass_equals_brute_force(backend, pictures):
    """Every family, every spelling, unequal pictures padded on the left: float64, 1e-9."""
    with torch.no_grad():
        expected, expected_tag = brute_force(backend, pictures, readout.SPELLINGS)
        hidden = backend._tree_hidden(pictures, small(backend), backend.full_trie, None)
        got = readout.read_distribution(hidden, backend.model.get_output_embeddings(), backend.full_trie)
    mass = got.probabilities * got.coverage[:, None]
    torch.testing.assert_close(mass, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(got.tag_probability, expected_tag, atol=1e-15, rtol=1e-9)
    assert mass.max() > 10 * mass.min()  # a flat distribution would agree with anything


def test_readout_after_a_reasoning_equals_brute_force(backend, pictures):
    thoughts = ["<think>The picture is sharp.</think>\n", "<think>poor</think>", "<think></think>\n\n"]
    with torch.no_grad():
        expected, _ = brute_force(backend, pictures, readout.SPELLINGS, thoughts)
        got = backend.distributions(pictures, small(backend), replies=thoughts)
    torch.testing.assert_close(got.probabilities * got.coverage[:, None], expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-5)])  # eager: softmax in float32
def test_replies_about_one_picture_share_its_pass(tiny_model, pictures, attention, tolerance, monkeypatch):
    spec = ModelSpec(str(tiny_model), dtype="float64", device="cpu", attn_implementation=attention)
    backend = TransformersBackend(spec)
    thoughts = ["<think>Sharp, well exposed.</think>", "<think>Noise.</think>\n", "<think>Blurred</think>\n\n"]
    picture = pictures[1]
    towers = []
    forward = backend.model.model.visual.forward
    monkeypatch.setattr(backend.model.model.visual, "forward", lambda *a, **k: towers.append(1) or forward(*a, **k))
    with torch.no_grad():
        apart = backend.distributions([picture.clone() for _ in thoughts], small(backend), replies=thoughts)
        towers.clear()
        seen = []
        rows = backend._rows
        monkeypatch.setattr(backend, "_rows", lambda x, *a, **k: seen.append(len(x)) or rows(x, *a, **k))
        shared = backend.distributions([picture] * 3, small(backend), replies=thoughts)
    assert towers == [1] and seen == [1]
    torch.testing.assert_close(shared.probabilities, apart.probabilities, atol=tolerance, rtol=0)
    torch.testing.assert_close(shared.tag_probability, apart.tag_probability, atol=tolerance, rtol=0)
    assert float((shared.probabilities[0] - shared.probabilities[1]).abs().max()) > 1e-4


def test_readout_equals_the_frequencies_of_sampled_replies(tiny_qwen2_5_vl):
    """Real decoding, the tag forced, the same prefix rule: mean and coverage within sampling error."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))
    picture, count, spellings = [torch.rand(3, 56, 56)], 1500, ("", " ")
    trie = readout.build_answer_trie(backend.tokenizer, spellings)
    assert len(trie.tag_tokens) == 1  # so that the tag can be forced as it is
    # Random weights hardly ever answer: raise the bias of the answer's tokens until a good share of replies is a score.
    head = backend.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[trie.leaf_tokens] = bias[trie.tokens] = 14.0
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    with torch.no_grad():
        hidden = backend._tree_hidden(picture, backend.pixel_config, trie, None)
        expected = readout.read_distribution(hidden, head, trie)
        inputs = backend._inputs(picture * count, backend.pixel_config, False, ["<answer>"] * count, False)
        output = backend.model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=6
        )
    tag = tuple(backend.tokenizer.encode("<answer>"))
    paths = {ids[len(tag) :]: score for ids, (score, _) in reply_paths(backend.tokenizer, spellings).items()}
    scores = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        scores += [1 + paths[tuple(ids[:n])] / 100 for n in range(1, 7) if tuple(ids[:n]) in paths]
    coverage, mean, std = float(expected.coverage), float(expected.mean), float(expected.std)
    assert 0.05 < coverage < 0.95
    assert abs(len(scores) / count - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / count)
    assert abs(sum(scores) / len(scores) - mean) < 4 * std / math.sqrt(len(scores))


def test_sampled_replies_follow_the_models_probabilities(tiny_qwen2_5_vl):
    """The seeded sampler draws from the softmax: first tokens of 400 replies against the probabilities."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))
    picture = [torch.rand(3, 56, 56)]
    with torch.no_grad():
        hidden = backend._tree_hidden(picture, backend.pixel_config, backend.full_trie, None)
        logits = backend.model.get_output_embeddings()(hidden)[0, 0]
    logits[backend._never_sampled] = -math.inf
    texts = [backend.tokenizer.decode([i], skip_special_tokens=True) for i in range(len(logits))]
    sampling = Sampling(num_samples=400, top_k=0, max_new_tokens=1)
    replies = backend.sample_replies(picture, backend.pixel_config, sampling, thinking=False, add_vision_id=False)[0]
    probabilities = logits.softmax(-1)
    for token in probabilities.topk(5).indices.tolist():
        expected = float(sum(p for p, text in zip(probabilities, texts, strict=True) if text == texts[token]))
        observed = sum(reply == texts[token] for reply in replies) / len(replies)
        assert abs(observed - expected) < 4 * math.sqrt(expected * (1 - expected) / len(replies)) + 1e-9


def test_eager_attention_equals_sdpa(tiny_model, pictures):
    results = []
    for attention in ("sdpa", "eager"):
        spec = ModelSpec(str(tiny_model), dtype="float32", device="cpu", attn_implementation=attention)
        backend = TransformersBackend(spec)
        with torch.no_grad():
            results.append(backend.distributions(pictures, backend.pixel_config).probabilities)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)


def _largest_change(backend, pictures, monkeypatch, replacement):
    with torch.no_grad():
        right = backend.distributions(pictures, backend.pixel_config).probabilities
        monkeypatch.setattr(backend.model.model, "forward", replacement(backend.model.model.forward))
        wrong = backend.distributions(pictures, backend.pixel_config).probabilities
    return float((right.log() - wrong.log()).abs().max())


def test_negative_control_boolean_mask_under_eager_attention(tiny_qwen2_5_vl, pictures, monkeypatch):
    """The silent trap: a boolean mask under eager attention raises nothing and is wrong. So ours must not be
    boolean.
    """
    spec = ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu", attn_implementation="eager")

    def with_boolean_mask(forward):
        def call(*, attention_mask, **kwargs):
            assert attention_mask.is_floating_point()
            return forward(attention_mask=attention_mask == 0, **kwargs)

        return call

    assert _largest_change(TransformersBackend(spec), pictures, monkeypatch, with_boolean_mask) > 0.1


def test_negative_control_missing_token_types(tiny_qwen2_5_vl, pictures, monkeypatch):
    """The silent trap: without ``mm_token_type_ids`` the model numbers visual tokens as text and raises nothing."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))

    def without_types(forward):
        def call(*, mm_token_type_ids, position_ids, **kwargs):
            assert int(mm_token_type_ids.sum()) > 0
            text_positions = torch.arange(position_ids.shape[-1]).expand_as(position_ids)
            return forward(position_ids=text_positions, **kwargs)

        return call

    assert _largest_change(backend, pictures, monkeypatch, without_types) > 0.1


def test_negative_control_causal_mask(tiny_qwen2_5_vl, pictures, monkeypatch):
    """Were the answer nodes to see each other, as under a plain causal mask, the result would be another."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))

    def with_causal_mask(forward):
        def call(*, attention_mask, **kwargs):
            return forward(attention_mask=torch.ones_like(attention_mask).tril(), **kwargs)

        return call

    assert _largest_change(backend, pictures[:1], monkeypatch, with_causal_mask) > 0.1


def test_trie_has_the_predicted_size(tiny_qwen2_5_vl):
    """With single-digit tokens and no blanks: `<`, `answer`, `>`, 5 digits, 5 points, 41 first decimals."""
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))
    trie = readout.build_answer_trie(backend.tokenizer, ("",))
    assert len(trie) == 3 + 5 + 5 + 41
    assert len(trie.leaf_rows) == 5 + 41 + 401
    assert sorted(set(trie.leaf_scores.tolist())) == list(range(401))
    seen = trie.ancestors()
    assert torch.equal(seen.sum(1), trie.depths)  # a node sees itself and its ancestors, as many as it is deep


def test_rare_spellings_are_dropped_on_a_fixed_picture_not_on_the_users(tiny_qwen2_5_vl):
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), dtype="float32", device="cpu"))
    blank_tokens = {t for s in ("> ", ">\n") for t in backend.tokenizer.encode("<answer" + s)[-1:]}
    head = backend.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[sorted(blank_tokens)] = -60.0
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert backend.trie.spellings == ("",)
    assert len(backend.trie) < len(backend.full_trie)


class _WordTokenizer:
    """A tokenizer whose tokens are given pieces; enough of the interface for the trie."""

    def __init__(self, split):
        self.split, self.vocabulary = split, {}

    def encode(self, text, add_special_tokens=False):
        return [self.vocabulary.setdefault(piece, len(self.vocabulary)) for piece in self.split(text)]

    def decode(self, ids, clean_up_tokenization_spaces=False):
        pieces = {number: piece for piece, number in self.vocabulary.items()}
        return "".join(pieces[i] for i in ids)


def test_trie_takes_tokens_of_several_digits():
    import re

    trie = readout.build_answer_trie(_WordTokenizer(re.compile(r"<answer>|</answer>|\d+|\s|\.").findall), ("",))
    assert sorted(set(trie.leaf_scores.tolist())) == list(range(401))
    assert len(trie) == 1 + 5 + 5 + 41  # the tag, 5 digits, 5 points, and 41 first decimals with a closing tag to read


def test_a_tokenizer_that_joins_score_and_tag_is_refused():
    import re

    tokenizer = _WordTokenizer(re.compile(r"<answer>|\d</|/|answer|>|\d|\s|\.|<").findall)
    with pytest.raises(readout.ReadoutError, match="joins the end of the score"):
        readout.build_answer_trie(tokenizer, ("",))


def test_a_tokenizer_that_changes_the_text_is_refused():
    tokenizer = _WordTokenizer(list)
    tokenizer.decode = lambda ids, clean_up_tokenization_spaces=False: "x" * len(ids)
    with pytest.raises(readout.ReadoutError, match="does not reproduce"):
        readout.build_answer_trie(tokenizer, ("",))


def test_parsed_text_and_grid_agree():
    for text, index in readout.score_texts():
        assert parse_reply(f"<answer>{text}</answer>").score == pytest.approx(1 + index / 100)
