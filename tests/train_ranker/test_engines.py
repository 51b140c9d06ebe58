"""The reward file for other engines, called as their sources call it."""

import json
import runpy
from pathlib import Path

import pytest

from vqr1_metric.protocol import write_reply
from vqr1_metric.train_ranker.reward import batch_rewards

FILE = Path(__file__).resolve().parents[2] / "examples/engine_rewards.py"


@pytest.fixture(scope="module")
def engine() -> dict:
    return runpy.run_path(str(FILE))


@pytest.fixture
def batch() -> tuple[list[str], list[dict]]:
    """Two data sets, three images with two replies each; the last reply has no score."""
    said = [2.0, 2.5, 4.0, 3.5, 1.0, 5.0, 3.0, 3.1, 4.0, 4.1, 2.0, None]
    replies = ["no score" if s is None else write_reply(s, "Sharp.") for s in said]
    truths = [
        {"image": f"{s}/{i}", "data_set": s, "mos": mos}
        for s, quality in (("a", (1.0, 3.0, 2.0)), ("b", (70.0, 20.0, 90.0)))
        for i, mos in enumerate(quality)
        for _ in range(2)
    ]
    return replies, truths


def test_all_three_give_the_same_rewards(engine: dict, batch) -> None:
    replies, truths = batch
    texts = [json.dumps(truth) for truth in truths]
    expected = batch_rewards(
        replies, [t["image"] for t in truths], [t["mos"] for t in truths], [t["data_set"] for t in truths]
    )
    verl = engine["verl_rewards"](
        data_sources=["a"] * 12, solution_strs=replies, ground_truths=texts, extra_infos=[None] * 12
    )
    inputs = [{"response": r, "response_length": 9, "ground_truth": t} for r, t in zip(replies, texts, strict=True)]
    easy = engine["compute_score"](inputs)
    swift = engine["VQR1Ranking"]()(completions=replies, ground_truth=texts, images=[None] * 12)
    assert engine["REWARD_TYPE"] == "batch"
    for i in range(11):
        assert verl[i]["score"] == easy[i]["overall"] == swift[i] == pytest.approx(expected[i] + 1)
        assert easy[i]["accuracy"] == verl[i]["ranking"] == pytest.approx(expected[i])
    assert (verl[11]["score"], easy[11]["overall"], swift[11]) == (0, 0, 0)


def test_the_order_of_a_batch_does_not_matter(engine: dict, batch) -> None:
    replies, truths = batch
    straight = engine["rewards"](replies, truths)
    order = [5, 0, 11, 3, 8, 1, 2, 10, 4, 9, 6, 7]
    shuffled = engine["rewards"]([replies[i] for i in order], [truths[i] for i in order])
    assert [straight[i] for i in order] == [pytest.approx(one) for one in shuffled]


def test_the_training_data_of_the_engines(engine: dict, rated: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    engine["main"]([str(rated / "noise.csv"), str(rated / "blur.txt"), "-o", str(tmp_path)])
    verl = datasets.Dataset.from_parquet(str(tmp_path / "verl.parquet"), cache_dir=str(tmp_path / "cache"))
    swift, easy = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("ms_swift", "easyr1")
    )
    assert len(verl) == len(swift) == len(easy) == 24
    truth = json.loads(verl[0]["reward_model"]["ground_truth"])
    assert truth == json.loads(easy[0]["answer"]) == json.loads(swift[0]["ground_truth"])
    assert truth["data_set"] == "noise" and Path(easy[0]["images"][0]).is_file()
    assert verl[0]["prompt"][0]["content"].startswith("<image>You are doing the image quality assessment task.")
