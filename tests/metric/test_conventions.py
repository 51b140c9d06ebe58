"""torchmetrics' conventions, by the checks of its own tester: class, functional, two processes, dtypes, a subclass."""

import subprocess
import sys

import metric_tester
import pytest
import torch
from metric_tester import MetricTester, cases, pictures, reference_of

from vqr1_metric import QualityScorer, VisualQualityR1Score, visual_quality_r1_score

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture(scope="module")
def scores(tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32")
    return lambda images: torch.tensor([result.score for result in scorer.score(images)])


@pytest.mark.parametrize("case", range(7))
def test_class(case, scores, tiny_qwen2_5_vl):
    kind, args = cases(str(tiny_qwen2_5_vl))[case]
    MetricTester().run_class(kind, args, *pictures(), reference_of(scores, kind, args))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_functional(reduction, scores, tiny_qwen2_5_vl):
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32")
    reference = reference_of(scores, VisualQualityR1Score, {"reduction": reduction})
    MetricTester().run_functional(
        lambda images: visual_quality_r1_score(images, scorer, reduction=reduction), pictures()[0], reference
    )


def test_dtypes(tiny_qwen2_5_vl):
    for kind, args in cases(str(tiny_qwen2_5_vl))[:2]:
        MetricTester().run_dtypes(kind, args, pictures()[0])


def test_two_processes(tiny_qwen2_5_vl, tmp_path):
    command = [sys.executable, metric_tester.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", tmp_path, tiny_qwen2_5_vl], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
