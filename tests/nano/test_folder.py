"""The shipped folder: loads strictly, is small, has its tokenizer, and judges the sample pictures sensibly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from recipes.nano import naming
from recipes.nano.tokenizer import build_tokenizer
from vqr1_metric import protocol
from vqr1_metric.images import load_image
from vqr1_metric.images.distortions import distort
from vqr1_metric.nano import FOLDER, warning_for
from vqr1_metric.nano.modeling import NanoForConditionalGeneration
from vqr1_metric.scorer import QualityScorer

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "pictures"
LIMIT = 16_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def scorer() -> QualityScorer:
    return QualityScorer("nano", device="cpu")


def test_weights_are_small_and_half_precision() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= LIMIT
    with safe_open(weights, "pt") as stored:
        tensors = {stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
        assert tensors == {torch.float16}
        assert all(stored.get_tensor(name).isfinite().all() for name in stored.keys())  # noqa: SIM118


def test_folder_loads_strictly_with_its_class() -> None:
    _, report = NanoForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_folder_is_that_of_the_recipe(tokenizer) -> None:
    recipe = build_tokenizer()
    assert tokenizer.get_vocab() == recipe.get_vocab()
    assert json.loads((FOLDER / "config.json").read_text())["text_config"]["vocab_size"] == len(recipe)


@pytest.mark.parametrize("thinking", [False, True])
def test_every_word_of_the_questions_is_one_token(tokenizer, thinking: bool) -> None:
    tokens = tokenizer.tokenize(protocol.question(thinking))
    words = [token.removeprefix("Ġ") for token in tokens]
    assert "".join(token.replace("Ġ", " ") for token in tokens) == protocol.question(thinking)
    assert {"quality", "assessment", "representing", "answer"} <= set(words)
    assert all(len(word) > 1 or not word.isalpha() or word == "a" for word in words)


@pytest.mark.parametrize(
    "text", ["<answer>3.42</answer><|im_end|>", "<think>\nSlight blur.\n</think>\n", "Größe 12, 日本語\t\n\n  end", ""]
)
def test_every_text_has_a_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_writes_the_published_format(tokenizer) -> None:
    chat = protocol.messages(False)
    plain = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert plain == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        + protocol.question(False)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    numbered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, add_vision_id=True)
    assert numbered == plain.replace("<|vision_start|>", "Picture 1: <|vision_start|>")
    assert not tokenizer.apply_chat_template(chat, tokenize=False).endswith("assistant\n")


def test_spoiled_sample_pictures_score_lower(scorer: QualityScorer) -> None:
    results = {Path(result.name).stem: result for result in scorer.score(sorted(map(str, PICTURES.glob("*.jpg"))))}
    assert len(results) == 6
    assert all(result.error is None and result.reliable for result in results.values())
    assert all(result.coverage > 0.9 and result.tag_probability > 0.9 for result in results.values())
    good = results.pop("lake").score
    assert all(good > spoiled.score + 0.3 for spoiled in results.values()), {n: r.score for n, r in results.items()}


def test_scores_fall_with_strength_on_the_sample_scene(scorer: QualityScorer) -> None:
    from PIL import Image

    scene = Image.open(PICTURES / "lake.jpg")
    for name in ("blur", "noise", "jpeg", "rescale"):
        scores = [result.score for result in scorer.score([distort(scene, name, level) for level in (0, 3, 6, 8)])]
        assert scores == sorted(scores, reverse=True), (name, scores)


def test_greedy_reply_is_a_score_and_nothing_else(scorer: QualityScorer) -> None:
    backend = scorer.backend
    inputs = backend._inputs([load_image(str(PICTURES / "lake.jpg"), "lake")], scorer.pixel_config, False, None, False)
    output = backend.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    reply = backend.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    head, tail = reply[:8], reply[-9:]
    assert (head, tail) == ("<answer>", "</answer>")
    assert 1 <= float(reply[8:-9]) <= 5


def test_reasoning_names_what_was_done_to_the_sample_scene() -> None:
    from PIL import Image

    scene = Image.open(PICTURES / "lake.jpg")
    spoiled = {name: distort(scene, name, 6) for name in ("noise", "jpeg")}
    results = naming.greedy("nano").score(list(spoiled.values()))
    assert [naming.named(result.replies[0].reasoning) for result in results] == list(spoiled)


def test_score_after_a_reasoning_stays_that_without_one(scorer: QualityScorer) -> None:
    thinking = QualityScorer("nano", "think", num_samples=2, device="cpu")
    pictures = [str(PICTURES / "lake.jpg"), str(PICTURES / "lake_crushed.jpg")]
    for plain, thought in zip(scorer.score(pictures), thinking.score(pictures), strict=True):
        assert abs(plain.score - thought.score) < 0.4
        assert all("The overall quality is" in reply.reasoning for reply in thought.replies)


def test_the_card_has_a_short_form(tmp_path: Path) -> None:
    card = json.loads((FOLDER / "card.json").read_text())
    assert warning_for(FOLDER) == card["warning"] and len(card["warning"]) < 160
    assert {kind["trust"] for kind in card["kinds"]} <= {"scores", "ordering", "no"}
    assert all(kind["kind"] and kind["sentence"].endswith(".") for kind in card["kinds"])
    assert warning_for(tmp_path) is None and warning_for(None) is None
