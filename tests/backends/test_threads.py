"""Threads that share one model: every score is the one it has alone, whatever else the model does meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vqr1_metric.backends import cpu
from vqr1_metric.backends.loading import ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.metric import VisualQualityR1Score
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

SIZES = ((56, 56), (84, 112), (112, 84), (140, 56))
ROUNDS = 4


def pictures():
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, *size, generator=generator) for size in SIZES]


def in_threads(*tasks):
    """Run the tasks at once, each in a thread of its own, and return their results."""
    start = threading.Barrier(len(tasks))

    def run(task):
        start.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def gradient(scorer, image):
    image = image.clone().requires_grad_()
    scorer.distributions(image, differentiable=True).mean.sum().backward()
    return image.grad


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_scores_thoughts_samples_and_gradients_at_once(tiny_qwen2_5_vl, attention):
    """Two scorers of each kind, that share the weights, against the same calls one after the other."""
    name = str(tiny_qwen2_5_vl)
    options = {"device": "cpu", "dtype": "float32", "attn_implementation": attention, "max_new_tokens": 4}
    images = pictures()
    thoughts = ["<think>Sharp.</think>", "<think>Noise.</think>\n"]

    def scorer(mode="score"):
        return QualityScorer(name, mode, num_samples=2, **options)

    tasks = {
        "score": lambda: [scorer().score(image)[0].score for image in images],
        "batch": lambda: [result.score for result in scorer().score(images)],
        "read": lambda: [
            scorer().backend.distributions([image] * 2, scorer().pixel_config, replies=thoughts).mean.tolist()
            for image in images
        ],
        "sample": lambda: [
            [reply.reasoning for reply in result.replies] for result in scorer("sample").score(images[:2])
        ],
        "gradient": lambda: [gradient(scorer(), image).tolist() for image in images[:2]],
        "metric": lambda: metric_of(name, images, options),
    }
    alone = {kind: task() for kind, task in tasks.items()}
    scorer().unload()  # so that loading and calibration happen among the threads too
    kinds = [*tasks, *tasks]
    for _ in range(ROUNDS):
        together = in_threads(*(tasks[kind] for kind in kinds))
        for kind, result in zip(kinds, together, strict=True):
            assert result == alone[kind], kind


def metric_of(name, images, options):
    metric = VisualQualityR1Score(name, device="cpu", dtype=options["dtype"])
    for image in images:
        metric.update(image[None])
    return float(metric.compute())


def test_moving_the_weights_waits_for_a_call(tiny_qwen2_5_vl, monkeypatch):
    backend = TransformersBackend(ModelSpec(str(tiny_qwen2_5_vl), device="cpu", dtype="float32"))
    second = TransformersBackend.__new__(TransformersBackend)
    second.__dict__.update(backend.__dict__)
    happened, inside, moved = [], threading.Event(), threading.Event()
    forward = backend.model.model.forward

    def slow(**kwargs):
        inside.set()
        happened.append(moved.wait(0.3))
        return forward(**kwargs)

    monkeypatch.setattr(backend.model.model, "forward", slow)
    monkeypatch.setattr(second, "_home", torch.device("meta"))
    monkeypatch.setattr(backend.model, "to", lambda device: moved.set())

    def move():
        inside.wait()
        second.to_own_device()

    with torch.no_grad():
        in_threads(lambda: backend.distributions(pictures()[:1], backend.pixel_config), move)
    assert moved.is_set() and not any(happened)


def test_gradient_checkpointing_recomputes_what_was_computed(tiny_model):
    """The weights' gradients of the readout, with and without; the recomputation runs outside of any call of ours."""
    gradients = []
    for checkpointing in (False, True):
        backend = TransformersBackend(ModelSpec(str(tiny_model), device="cpu", dtype="float64"))
        model = backend.model.requires_grad_(True)
        backend.trie  # noqa: B018
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model.train()
        images = [image for image in pictures() if image.shape[-1] > 56]
        backend.distributions(images, backend.pixel_config).mean.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-10, rtol=1e-8, msg=name)


def test_switch_of_the_process_is_turned_back_by_the_last_thread(monkeypatch):
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    monkeypatch.setattr(cpu, "_onednn_is_faster", lambda: True)
    before, first_in, second_in, first_out = matmul.fp32_precision, *(threading.Event() for _ in range(3))
    seen = []

    def first():
        with cpu.fast_products():
            first_in.set()
            second_in.wait(10)
        seen.append(matmul.fp32_precision)
        first_out.set()

    def second():
        first_in.wait(10)
        with cpu.fast_products():
            second_in.set()
            first_out.wait(10)

    in_threads(first, second)
    assert seen == ["bf16"] and matmul.fp32_precision == before
