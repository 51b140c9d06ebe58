"""Closed questions to a server, against the same model read in one pass; a strict stand-in on loopback."""

from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, serving, tiny_backend

from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.http import HttpBackend
from vqr1_metric.protocol import QUESTIONS, Question
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


def image(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 56, 84), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def likely_question(model, opening: str) -> Question:
    """A question whose answers this random model is likely to give, of one token and of two."""
    asked = Question("What is it?", {"a": 0.0, "b": 1.0}, "likely", opening)

    def following(reply: str) -> list[str]:
        """Likely next tokens that the tokenizer would cut off there too."""
        inputs = model._inputs([image(1)], model.pixel_config, False, [reply], False, asked)
        tokens = model.model(**inputs).logits[0, -1].topk(20).indices.tolist()
        begun = model.tokenizer.encode(reply, add_special_tokens=False)
        texts = [(token, model.tokenizer.decode([token])) for token in tokens]
        fits = (model.tokenizer.encode(reply + text, add_special_tokens=False) == [*begun, t] for t, text in texts)
        return [text for (_, text), fit in zip(texts, fits, strict=True) if fit and text and text == text.strip()]

    first, *others = following(opening)
    second = next(text for text in others if not text.startswith(first) and not first.startswith(text))
    longer = second + following(opening + second)[0]
    return Question("What is it?", {first: 1.0, longer: 7.0}, "likely", opening)


@pytest.mark.parametrize("opening", ["", "The quality is"])
def test_answers_of_a_server_are_those_of_one_pass(tiny_qwen2_5_vl: Path, opening: str) -> None:
    model = tiny_backend(tiny_qwen2_5_vl)
    server = ChatServer(model)
    server.other = question = likely_question(model, opening)
    images = [image(1), image(2)]
    with serving(server.app()) as address:
        backend = HttpBackend(f"{address}/v1", backoff=0.01, pixel_config=model.pixel_config, threshold=1e-6)
        scorer = QualityScorer(backend=backend, question=question)
        results = scorer.score(images)
        asked = len(server.requests)
        answers = scorer.ask(images, [question])
        with pytest.raises(ModelError, match="opening_given=True"):
            backend.distributions(
                images,
                backend.pixel_config,
                question=Question("?", question.answers, opening="So", opening_given=False),
            )
    with torch.no_grad():
        local = model.distributions(images, model.pixel_config, question=question)
    seen = 0
    for i, result in enumerate(results):
        expected = local.probabilities[i] * local.coverage[i]
        got = result.distribution.probabilities * result.coverage
        listed = got > 0  # what is not among the server's twenty is missing, never spread
        torch.testing.assert_close(got[listed], expected[listed], atol=1e-4, rtol=1e-3)
        seen += int(listed.sum())
        assert answers[i]["likely"].score == pytest.approx(result.score, nan_ok=True)
    assert seen >= 2 and asked > 2
    assert results[0].tag_probability == 1 and scorer.identity()["question"] == question.identity()


def test_a_server_without_probabilities_is_no_place_for_closed_questions(tiny_qwen2_5_vl: Path) -> None:
    server = ChatServer(tiny_backend(tiny_qwen2_5_vl), states_logprobs=False)
    with serving(server.app()) as address:
        backend = HttpBackend(f"{address}/v1", backoff=0.01)
        with (
            pytest.warns(UserWarning, match="no log-probabilities"),
            pytest.raises(ModelError, match="closed questions"),
        ):
            backend.distributions([image(1)], backend.pixel_config, question=QUESTIONS["levels"])
