"""Other questions through the scorer: names, prompts, several at once, two images; on real tiny models."""

import json
import math
import pickle

import pytest
import torch

from vqr1_metric.functional.distribution import GRID_SIZE, MAX_SCORE, MIN_SCORE, STEPS_PER_UNIT
from vqr1_metric.images import ImageError
from vqr1_metric.protocol import QUESTIONS, SCORES, VISUALQUALITY_R1, Question, closed_answers, find_question
from vqr1_metric.results import Comparison
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

SHARP = Question("How sharp is this?", {"1": 1.0, "2": 2.0, "3": 3.0, "9": 9.0}, "sharp", opening="<answer>")


def pictures(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, h, w, generator=generator) for h, w in sizes]


def scorer(model, question=VISUALQUALITY_R1, **options):
    return QualityScorer(str(model), device="cpu", dtype="float32", question=question, **options)


# ---------------------------------------------------------------- the value


def test_the_default_question_and_its_grid():
    assert len(SCORES) == 447 and VISUALQUALITY_R1.reads_scores
    grid = [MIN_SCORE + i / STEPS_PER_UNIT for i in range(GRID_SIZE)]
    assert VISUALQUALITY_R1.values == pytest.approx(grid) and VISUALQUALITY_R1.values[-1] == MAX_SCORE
    assert len(VISUALQUALITY_R1.beginnings) == 46  # 5 as d and 41 as d.d
    assert find_question("visualquality-r1") is VISUALQUALITY_R1


def test_identity_holds_all_but_name_and_source():
    assert len({json.dumps(q.identity(), sort_keys=True) for q in QUESTIONS.values()}) == len(QUESTIONS)
    a = Question("Good?", {"yes": 1, "no": 0}, "a", source="x")
    assert a.identity() == Question("Good?", {"no": 0, "yes": 1}, "b").identity()
    changes = {
        "text": "Bad?",
        "answers": {"yes": 1, "no": -1},
        "opening": "So",
        "opening_given": False,
        "closing": ".",
        "spellings": (" ",),
        "system": "You judge.",
        "thinking_text": "Think. Good?",
        "images": 2,
    }
    for name, value in changes.items():
        options = {"text": "Good?", "answers": {"yes": 1, "no": 0}, name: value}
        assert Question(**options).identity() != a.identity(), name
    assert set(changes) == set(a.identity())


def test_questions_can_be_pickled_and_compared():
    assert pickle.loads(pickle.dumps(VISUALQUALITY_R1)) is VISUALQUALITY_R1
    again = pickle.loads(pickle.dumps(SHARP))
    assert again == SHARP and hash(again) == hash(SHARP) and len({SHARP, again}) == 1


def test_answers_as_a_user_names_them():
    assert closed_answers("yes,no") == {"yes": 1, "Yes": 1, "no": 0, "No": 0}
    assert closed_answers(" 1, 2,3 ") == {"1": 1, "2": 2, "3": 3}
    assert closed_answers("sharp=2,soft=0.5")["Soft"] == 0.5
    assert [closed_answers("a,b,c")[text] for text in "abc"] == [1, 0.5, 0]
    for wrong in ("yes", "yes,,no", "a=1,b", "a=x,b=2", "a,a"):
        with pytest.raises(ValueError, match="Expected"):
            closed_answers(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": " "}, "empty text"),
        ({"answers": {"yes": 1}}, "at least two answers"),
        ({"answers": {"yes": 1, "no": 1}}, "different finite values"),
        ({"answers": {"yes": 1, "no": math.nan}}, "finite"),
        ({"answers": {"yes": 1, " no": 0}}, "blanks around"),
        ({"answers": {"poor": 0, "poorly": 1}}, "closing text, since the answer 'poor'"),
        ({"spellings": ("x",)}, "blank space"),
        ({"spellings": ()}, "blank space"),
    ],
)
def test_wrong_questions_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Question(**{"text": "Good?", "answers": {"yes": 1, "no": 0}, **options})


def test_names_and_modes_that_do_not_fit(tiny_qwen2_5_vl):
    with pytest.raises(ValueError, match=r"one of the questions .*levels"):
        QualityScorer("nano", question="level")
    with pytest.raises(ValueError, match="mode='score' with the question 'levels'"):
        QualityScorer("nano", "think", question="levels")
    with pytest.raises(ValueError, match="asks about 2 images"):
        QualityScorer("nano", question="pairwise")
    with pytest.raises(ValueError, match="Expected mode"):
        scorer(tiny_qwen2_5_vl, "levels").replace(mode="sample")


# ---------------------------------------------------------------- scoring


def test_levels_are_scores_like_any_other(tiny_qwen2_5_vl):
    images = pictures((56, 84), (100, 60), (56, 56))
    judge = scorer(tiny_qwen2_5_vl, "levels")
    results = judge.score(images)
    for result, words in zip(results, judge.ask(images, ["levels"]), strict=True):
        distribution = words["levels"].distribution
        assert distribution.answers == ("bad", "poor", "fair", "good", "excellent")
        assert result.distribution.values is None and len(result.distribution.probabilities) == GRID_SIZE
        assert result.score == pytest.approx(float(distribution.probabilities @ torch.arange(1.0, 6.0)), abs=1e-4)
        assert 0 < result.coverage < 1 and result.tag_probability == 1
    assert judge.compare(*images[:2]).win_probability == pytest.approx(Comparison.of(*results[:2]).win_probability)
    default = scorer(tiny_qwen2_5_vl)
    assert default.fingerprint != judge.fingerprint
    assert [r.score for r in results] != [r.score for r in default.score(images)]


def test_alignment_asks_about_each_images_prompt(tiny_qwen2_5_vl):
    images, prompts = pictures((56, 84), (100, 60), (56, 84)), ["a lake", "a red bicycle at night", "a dog"]
    judge = scorer(tiny_qwen2_5_vl, "alignment")
    results = judge.score(images, prompts=prompts)
    assert all(0 <= result.score <= 1 for result in results) and results[0].distribution.values == (0.0, 1.0)
    alone = [judge.score(i, prompts=[p])[0].score for i, p in zip(images, prompts, strict=True)]
    assert [r.score for r in results] == pytest.approx(alone, abs=0, rel=1e-3)
    assert [r.score for r in judge.stream(iter(images), prompts=iter(prompts))] == pytest.approx(alone, abs=0, rel=1e-3)
    assert judge.distributions(images, prompts=prompts).mean.tolist() == pytest.approx(alone, abs=0, rel=1e-3)
    one = [result.score for result in judge.score(images, prompts="a lake")]
    assert one[0] == pytest.approx(alone[0], abs=0, rel=1e-3) and one[1] != pytest.approx(alone[1], abs=0, rel=1e-3)
    question = QUESTIONS["alignment"].about("a dog")
    assert scorer(tiny_qwen2_5_vl, question).score(images[2])[0].score == pytest.approx(alone[2], abs=0, rel=1e-3)
    with pytest.raises(ValueError, match="Expected prompts="):
        judge.score(images)
    with pytest.raises(ValueError, match="prompt for each of 3 images, but got 2"):
        judge.score(images, prompts=prompts[:2])
    with pytest.raises(ValueError, match="more images than prompts"):
        list(judge.stream(images, prompts=prompts[:2]))


def test_a_question_of_the_users_own(tiny_qwen2_5_vl):
    images = pictures((56, 84), (100, 60))
    results = scorer(tiny_qwen2_5_vl, SHARP).score(images)
    for result in results:
        assert result.distribution.values == (1.0, 2.0, 3.0, 9.0) and 1 <= result.score <= 9
        low, high = result.interval(0.9)
        assert low <= result.score <= high and float(result.distribution.entropy) > 0
    images = torch.stack([images[0], images[0].flip(-1)]).requires_grad_()
    scorer(tiny_qwen2_5_vl, SHARP).distributions(images, differentiable=True).mean.sum().backward()
    assert bool((images.grad.flatten(1).abs().sum(1) > 0).all())


def test_several_questions_at_once_equal_each_alone(tiny_qwen2_5_vl, tmp_path):
    """With a bad image among them; batches of any size."""
    images = [*pictures((56, 84), (100, 60)), tmp_path / "missing.png", *pictures((84, 84))]
    prompts = ["a lake", "a dog", "nothing", "a red bicycle"]
    names = ["sharpness", "alignment", "aesthetics", SHARP]
    judge = scorer(tiny_qwen2_5_vl)
    answers = judge.ask(images, names, prompts=prompts)
    tight = scorer(tiny_qwen2_5_vl, batch_tokens=1).ask(images, names, prompts=prompts)
    assert [list(answer) for answer in answers] == [["sharpness", "alignment", "aesthetics", "sharp"]] * 4
    for name in names:
        question = find_question(name)
        alone = scorer(tiny_qwen2_5_vl, question).score(images, prompts=prompts)
        for one, answer, small in zip(alone, answers, tight, strict=True):
            assert answer[question.name].score == pytest.approx(one.score, abs=0, rel=1e-3, nan_ok=True)
            assert small[question.name].score == pytest.approx(one.score, abs=0, rel=1e-3, nan_ok=True)
            assert answer[question.name].name == one.name
    assert "no such file" in answers[2]["sharp"].error and math.isnan(answers[2]["sharp"].score)
    for wrong in ([], ["levels", "levels"], ["pairwise"]):
        with pytest.raises(ValueError, match="different names"):
            judge.ask(images, wrong)


def test_preference_is_the_mean_of_both_orders(tiny_qwen2_5_vl):
    a, b = pictures((56, 84), (100, 60))
    judge = scorer(tiny_qwen2_5_vl)
    result = judge.prefer(a, b)
    backend, question = judge.backend, QUESTIONS["pairwise"]
    with torch.no_grad():
        ab = backend.distributions([(a, b)], judge.pixel_config, question=question).mean
        ba = backend.distributions([(b, a)], judge.pixel_config, question=question).mean
    assert result.score == pytest.approx(float((ab + 1 - ba) / 2), abs=1e-5)
    assert judge.prefer(b, a).score == pytest.approx(1 - result.score, abs=1e-5)
    with pytest.raises(ValueError, match="about two images"):
        judge.prefer(a, b, "levels")
    with pytest.raises(ImageError, match="no such file"):
        judge.prefer(a, "/nowhere.png")


def test_a_model_with_linear_attention_is_asked_like_any_other(tiny_qwen3_5):
    images = pictures((56, 84), (100, 60), (84, 84))
    judge = scorer(tiny_qwen3_5, "levels")
    together = [r.score for r in judge.score(images)]
    assert together == pytest.approx([judge.score(image)[0].score for image in images], abs=1e-4)
    default = scorer(tiny_qwen3_5)
    assert [r.error for r in default.score(images)] == [None] * 3
    sampled = scorer(tiny_qwen3_5, mode="sample", num_samples=2, max_new_tokens=4).score(images[:2])
    assert all(len(result.replies) == 2 for result in sampled)
