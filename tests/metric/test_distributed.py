"""The metric over two processes (gloo): uneven and empty ranks, forward, distributions, mixed configurations."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vqr1_metric import QualityScorer
from vqr1_metric.functional.intervals import mean_interval

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")
WORKER = Path(__file__).with_name("distributed_worker.py")
close = {"atol": 2e-5, "rtol": 0}  # float32 in batches of different sizes


@pytest.fixture(scope="module")
def seen(tmp_path_factory, tiny_qwen2_5_vl):
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks, logs = [], [folder / f"{rank}.log" for rank in range(2)]
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stderr:
                command = [sys.executable, WORKER, str(rank), "2", folder, tiny_qwen2_5_vl]
                ranks.append(subprocess.Popen(command, stderr=stderr))
        end = time.monotonic() + 120
        while time.monotonic() < end and {process.poll() for process in ranks} in ({None}, {None, 0}):
            time.sleep(0.1)  # until both are done or one has failed, for which the other would wait
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(tiny_qwen2_5_vl):
    """The distributions of the eight pictures, in one process."""
    images = torch.rand(8, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32").distributions(images)


def test_uneven_ranks(seen, expected):
    for rank in seen:
        torch.testing.assert_close(rank["every"], expected.mean[:4], **close)
        torch.testing.assert_close(rank["mean"], expected.mean[:4].mean(), **close)
        torch.testing.assert_close(rank["mean of five"], expected.mean[:5].mean(), **close)
        torch.testing.assert_close(rank["distributions"], expected.probabilities[:4], **close)
    assert [rank["local"] for rank in seen] == [[3, 2, 3], [1, 1, 1]]
    assert [rank["all details"] for rank in seen] == [4, 4]


def test_the_interval_covers_all_ranks(seen, expected):
    interval = mean_interval(expected.mean)
    for rank in seen:
        torch.testing.assert_close(rank["interval"], interval, **close)


def test_empty_ranks(seen, expected):
    for rank in seen:
        torch.testing.assert_close(rank["one rank empty"], expected.mean[:2], **close)
        torch.testing.assert_close(rank["one rank empty, distributions"], expected.coverage[:2], **close)
        torch.testing.assert_close(rank["then filled"], expected.mean[[0, 1, 2, 2]], **close)
        assert rank["all empty"].isnan()


def test_forward(seen, expected):
    for index, rank in enumerate(seen):
        own = [expected.mean[index], expected.mean[index + 2], expected.mean[:4].mean()]
        torch.testing.assert_close(rank["forward"], own, **close)
        both = [expected.mean[:2].mean(), expected.mean[2:4].mean(), expected.mean[:4].mean()]
        torch.testing.assert_close(rank["forward, synced"], both, **close)


def test_another_configuration_on_another_rank_is_refused(seen, expected):
    for rank in seen:
        assert "on every rank" in rank["refused"]
        torch.testing.assert_close(rank["kept"], torch.tensor([2, float(expected.mean[:2].mean())]).double(), **close)


def test_no_thread_outlives_the_group(seen):
    """Not even though transformers is imported, with the model, while there is a group."""
    assert all(rank["threads"] is not None and not [n for n in rank["threads"] if "gloo" in n] for rank in seen)
