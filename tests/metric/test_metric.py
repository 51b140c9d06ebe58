"""`VisualQualityR1Score` and its functional twin on a tiny real model: one set of inputs, then every convention."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

from vqr1_metric import QualityScorer, VisualQualityR1Score, visual_quality_r1_score
from vqr1_metric.images import ImageError

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

INPUTS = ("uint8", "float", "one picture", "unequal sizes", "pil", "paths", "arrays", "mixed")


@pytest.fixture
def scorer(tiny_qwen2_5_vl):
    return QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32")


@pytest.fixture
def metric(scorer):
    return VisualQualityR1Score(scorer=scorer)


@pytest.fixture
def passes(scorer, monkeypatch):
    """How many pictures went through the model, call by call."""
    calls = []
    forward = scorer.backend.distributions
    monkeypatch.setattr(
        scorer.backend, "distributions", lambda im, *a, **k: calls.append(len(im)) or forward(im, *a, **k)
    )
    return calls


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def batches(kind, folder):
    """Two batches of pictures, as a user may hold them."""
    floats = noise(2, 2, 3, 60, 84)
    bytes_ = (floats * 255).round().to(torch.uint8)
    arrays = bytes_.permute(0, 1, 3, 4, 2).numpy()
    pictures = [[Image.fromarray(array) for array in batch] for batch in arrays]
    if kind == "paths":
        for i, picture in enumerate(p for batch in pictures for p in batch):
            picture.save(folder / f"{i}.png")
        return [[folder / "0.png", str(folder / "1.png")], folder / "2.png"]
    return {
        "uint8": list(bytes_),
        "float": list(floats),
        "one picture": [floats[0, 0], floats[0, 1]],
        "unequal sizes": [[noise(3, 56, 56), noise(3, 30, 90, seed=1)], [noise(3, 100, 57, seed=2)]],
        "pil": pictures,
        "arrays": [arrays[0], list(arrays[1])],
        "mixed": [[floats[0, 0], pictures[0][1]], [bytes_[1, 0], arrays[1, 1], noise(1, 56, 60)]],
    }[kind]


@pytest.mark.parametrize("kind", INPUTS)
def test_class_equals_functional_equals_scorer(kind, scorer, tmp_path):
    mean, every = VisualQualityR1Score(scorer=scorer), VisualQualityR1Score(scorer=scorer, reduction="none")
    expected = []
    for batch in batches(kind, tmp_path):
        expected += [result.score for result in scorer.score(batch)]
        mean.update(batch)
        value = every(batch)
        torch.testing.assert_close(value, visual_quality_r1_score(batch, scorer, reduction="none"), atol=0, rtol=0)
        torch.testing.assert_close(value.mean(), visual_quality_r1_score(batch, scorer), atol=0, rtol=0)
    assert every.compute().tolist() == torch.tensor(expected).tolist()
    assert float(mean.compute()) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert mean.compute().shape == () and mean.compute().dtype == torch.float32
    assert len(set(expected)) > 1 and all(1 <= score <= 5 for score in expected)


def test_nothing_loads_at_construction(tiny_qwen2_vl):
    metric = VisualQualityR1Score(str(tiny_qwen2_vl), dtype="bfloat16", device="cpu", batch_tokens=2000)
    metric.offload(), metric.unload(), metric.reset(), metric.clone()
    assert not metric.scorer.loaded and metric.scorer.batch_tokens == 2000
    assert "QualityScorer" in repr(metric)


def test_the_class_attributes_torchmetrics_reads():
    assert VisualQualityR1Score.is_differentiable is False and VisualQualityR1Score.higher_is_better is True
    assert VisualQualityR1Score.full_state_update is False
    assert (VisualQualityR1Score.plot_lower_bound, VisualQualityR1Score.plot_upper_bound) == (1.0, 5.0)


@pytest.mark.parametrize("dist_sync_on_step", [False, True])
def test_one_model_pass_per_forward(scorer, passes, dist_sync_on_step):
    metric = VisualQualityR1Score(scorer=scorer, dist_sync_on_step=dist_sync_on_step)
    images = noise(4, 3, 56, 56)
    first, second = metric(images[:3]), metric(images[3:])
    assert passes == [3, 1] and metric.update_count == 2
    assert float(metric.compute()) == pytest.approx((3 * float(first) + float(second)) / 4, abs=1e-6)
    assert len(metric.details()) == 4 and passes == [3, 1]


def test_bad_pictures_lose_nothing_else(scorer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    good = noise(2, 3, 56, 56)
    metric = VisualQualityR1Score(scorer=scorer, reduction="none", keep_distributions=True)
    with pytest.warns(UserWarning, match=r"2 of 4 pictures.*broken\.png"):
        metric.update([good[0], tmp_path / "broken.png", tmp_path / "missing.png", good[1]])
    metric.update([tmp_path / "missing.png"])  # said once: a second warning would be an error
    assert metric.num_failed == 3
    scores = metric.compute()
    assert scores.isnan().tolist() == [False, True, True, False, True]
    assert scores[[0, 3]].tolist() == visual_quality_r1_score(good, scorer, reduction="none").tolist()
    assert "no such file" in metric.details()[2].error and metric.details()[0].error is None
    assert metric.distributions().mean.isnan().tolist() == scores.isnan().tolist()
    mean = VisualQualityR1Score(scorer=scorer)
    with pytest.warns(UserWarning, match="1 of 3"):
        mean.update([good[0], tmp_path / "missing.png", good[1]])
    assert float(mean.compute()) == float(scores[[0, 3]].mean())
    only_bad = [tmp_path / "missing.png"]
    with pytest.warns(UserWarning, match="Not one picture"):
        assert visual_quality_r1_score(only_bad, scorer).isnan()


@pytest.mark.parametrize("call", ["update", "forward"])
def test_on_error_raise_keeps_what_was_stored(scorer, call, tmp_path):
    metric = VisualQualityR1Score(scorer=scorer, on_error="raise")
    images = noise(2, 3, 56, 56)
    before = metric(images)
    with pytest.raises(ImageError, match=r"missing\.png"):
        getattr(metric, call)([images[0], tmp_path / "missing.png"])
    assert metric.compute() == before and len(metric.details()) == 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_empty_is_nan_with_a_warning(scorer):
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert VisualQualityR1Score(scorer=scorer).compute().isnan()
    metric = VisualQualityR1Score(scorer=scorer)
    with pytest.warns(UserWarning, match="Not one picture"):
        assert metric(torch.zeros(0, 3, 56, 56)).isnan()
    with pytest.warns(UserWarning, match="at least two scores"):
        assert all(bound.isnan() for bound in metric.confidence_interval())
    assert VisualQualityR1Score(scorer=scorer, reduction=None).compute().shape == (0,)
    assert len(metric.distributions()) == 0 and metric.details() == [] and metric.num_failed == 0
    metric.update(noise(2, 3, 56, 56))
    assert metric.compute().isfinite()


def test_a_single_score_keeps_its_dimension(scorer):
    metric = VisualQualityR1Score(scorer=scorer, reduction="none")
    assert metric(noise(3, 56, 56)).shape == metric.compute().shape == (1,)


def test_weights_are_no_part_of_the_metric(metric):
    metric.update(noise(1, 3, 56, 56))
    module = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "metric": metric})
    weights = metric.scorer.backend.model
    assert list(metric.parameters()) == [] and list(metric.buffers()) == [] and list(metric.children()) == []
    assert set(module.state_dict()) == {"net.weight", "net.bias"}
    module.train().half().requires_grad_(True)
    assert not weights.training and weights.dtype == torch.float32
    assert not any(p.requires_grad for p in weights.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_the_weights_and_nothing_else(metric, duplicate):
    images = noise(3, 3, 56, 56)
    metric.update(images[:2])
    other = duplicate(metric)
    assert other.scorer.backend is metric.scorer.backend
    assert other.compute() == metric.compute() and len(other.details()) == 2
    before = metric.compute()
    other.update(images[2:])
    metric._computed = None
    assert metric.compute() == before and len(metric.details()) == 2 and len(other.details()) == 3
    assert other.compute() != before
    assert len(pickle.dumps(metric)) < 100_000  # two distributions and some bytes; the tiny model has 0.8 MB


def test_dtype_and_device_leave_the_scores_alone(metric):
    images = noise(3, 3, 56, 56)
    metric.update(images[:2])
    before, fingerprint = metric.compute(), metric.fingerprint.clone()
    metric.half().double().set_dtype(torch.float16)
    torch.nn.ModuleList([metric]).half().to(torch.bfloat16).to("cpu")
    metric.to(torch.float16)
    metric._computed = None
    assert metric.compute() == before and metric.compute().dtype == torch.float32
    assert torch.equal(metric.fingerprint, fingerprint) and metric.fingerprint.dtype == torch.int64
    metric.update(images[2:])
    assert metric.scores[-1].dtype == torch.float32
    assert metric.to("meta").scores[0].device.type == "meta" and metric.scorer.backend.device.type == "cpu"


def test_autocast_changes_nothing(scorer, metric):
    images = noise(2, 3, 60, 84)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(images)
        twin = visual_quality_r1_score(images, scorer)
    assert metric.compute() == twin == visual_quality_r1_score(images, scorer)


def test_values_made_in_inference_mode_can_enter_a_loss(tiny_qwen2_5_vl):
    """Also if the weights were loaded there: the differentiable twin needs them outside of it."""
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32", attn_implementation="eager")
    metric = VisualQualityR1Score(scorer=scorer, keep_distributions=True)
    assert not scorer.loaded
    with torch.inference_mode():
        images = noise(2, 3, 56, 56)
        values = [metric(images), visual_quality_r1_score(images, scorer), metric.compute()]
        values += [*metric.confidence_interval(), metric.distributions().coverage[0]]
    weight = torch.ones((), requires_grad=True)
    sum(value * weight for value in values).backward()
    assert float(weight.grad) == pytest.approx(float(sum(values)))
    pixels = noise(1, 3, 56, 56).requires_grad_()
    visual_quality_r1_score(pixels, scorer, differentiable=True).backward()
    assert float(pixels.grad.abs().sum()) > 0
    scorer.unload()


def test_distributions_and_details(scorer):
    images = noise(3, 3, 60, 56)
    plain, kept = (VisualQualityR1Score(scorer=scorer, keep_distributions=keep) for keep in (False, True))
    expected = scorer.distributions(images)
    for metric in (plain, kept):
        metric.update(images)
        held = metric.distributions()
        torch.testing.assert_close(held.probabilities, expected.probabilities, atol=0, rtol=0)
        torch.testing.assert_close(held.coverage, expected.coverage, atol=0, rtol=0)
        torch.testing.assert_close(held.tag_probability, expected.tag_probability, atol=0, rtol=0)
        assert [result.std for result in metric.details()] == pytest.approx(expected.std.tolist(), abs=1e-6)
        metric.reset()
        assert len(metric.distributions()) == 0 and metric.details() == []


def test_confidence_interval(scorer, passes):
    metric = VisualQualityR1Score(scorer=scorer, confidence_level=0.9)
    metric.update(noise(12, 3, 56, 56))
    before = list(passes)
    low, high = metric.confidence_interval()
    scores = torch.cat(metric.scores)
    half = 1.645 * float(scores.std()) / math.sqrt(len(scores))
    assert float(high - low) == pytest.approx(2 * half, rel=0.2)
    assert low < metric.compute() < high
    assert metric.confidence_interval(seed=1) != (low, high) and metric.confidence_interval() == (low, high)
    wider = metric.confidence_interval(0.99, num_bootstraps=4000)
    assert wider[0] < low and wider[1] > high
    assert passes == before  # the model does not run for it
    with pytest.raises(ValueError, match="level"):
        metric.confidence_interval(95)
    with pytest.raises(ValueError, match="num_bootstraps"):
        metric.confidence_interval(num_bootstraps=0)


def test_merge_state(scorer, tiny_qwen2_5_vl):
    images = noise(3, 3, 56, 56)
    first, second = (VisualQualityR1Score(scorer=scorer, reduction="none") for _ in range(2))
    first.update(images[:2])
    second.update(images[2:])
    assert first.compute().shape == (2,)
    first.merge_state(second)
    torch.testing.assert_close(
        first.compute(), visual_quality_r1_score(images, scorer, reduction="none"), atol=2e-5, rtol=0
    )
    assert len(first.details()) == 3
    empty = VisualQualityR1Score(scorer=scorer, reduction="none")
    empty.merge_state(first.metric_state)
    assert torch.equal(empty.compute(), first.compute())
    with pytest.raises(RuntimeError, match="details of 3 pictures, but this metric has those of 0"):
        empty.details()
    other = VisualQualityR1Score(str(tiny_qwen2_5_vl), max_pixels=5000, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="different ones"):
        first.merge_state(other)
    with pytest.raises(ValueError, match="probabilities"):
        VisualQualityR1Score(scorer=scorer, keep_distributions=True).merge_state(first)
    with pytest.raises(ValueError, match="metric_state"):
        first.merge_state([1.0])
    assert len(first.compute()) == 3


def test_a_checkpointed_state_knows_its_configuration(scorer, tiny_qwen2_5_vl):
    metric = VisualQualityR1Score(scorer=scorer)
    metric.persistent(True)
    metric.update(noise(2, 3, 56, 56))
    state = metric.state_dict()
    assert set(state) == {"fingerprint", "scores"}
    again = VisualQualityR1Score(scorer=scorer)
    again.load_state_dict(dict(state))
    again.update(noise(2, 3, 56, 56))
    assert float(again.compute()) == pytest.approx(float(metric.compute()), abs=1e-6)
    with pytest.raises(ValueError, match="different ones"):
        VisualQualityR1Score(str(tiny_qwen2_5_vl), "think", device="cpu").load_state_dict(dict(state))


def test_where_the_model_runs_is_no_part_of_the_configuration(tiny_qwen2_5_vl):
    """Or the ranks of a distributed run, which use one GPU each, would refuse each other."""
    metrics = [VisualQualityR1Score(str(tiny_qwen2_5_vl), device=d, dtype="float32") for d in ("cpu", "cpu:0", "meta")]
    assert all(torch.equal(metric.fingerprint, metrics[0].fingerprint) for metric in metrics)
    automatic = [VisualQualityR1Score(str(tiny_qwen2_5_vl), device=device) for device in ("cpu", "meta")]
    assert not torch.equal(automatic[0].fingerprint, automatic[1].fingerprint)  # float32 here, bfloat16 there


def test_unload_leaves_no_weights_behind(tiny_qwen2_5_vl):
    import gc
    import weakref

    def stored():
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))

    images = noise(2, 3, 56, 56)
    before = stored()
    metric = VisualQualityR1Score(str(tiny_qwen2_5_vl), device="cpu", dtype="bfloat16")
    value = metric(images)
    weights = weakref.ref(metric.scorer.backend.model)
    assert stored() - before > 150_000
    metric.unload()
    # Two distributions of 401 numbers, two scores, the fingerprint and the values returned.
    assert stored() - before < 2_000
    assert weights() is None and metric.compute() == value
    assert metric(images) == value
    metric.unload()


def test_plot(metric):
    import matplotlib.pyplot as plt

    values = [metric(noise(2, 3, 56, 56, seed=seed)) for seed in range(3)]
    for fig, ax in (metric.plot(), metric.plot(values), metric.plot(torch.stack(values))):
        assert ax.get_ylim()[0] <= 1 and ax.get_ylim()[1] >= 5
        plt.close(fig)


def test_compute_groups_share_a_pass_and_never_a_configuration(scorer, passes, tiny_qwen2_5_vl):
    """At first the pictures are within the lower limit, so that both configurations give the same scores."""
    small = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32", max_pixels=56 * 56)
    collection = MetricCollection(
        {
            "mean": VisualQualityR1Score(scorer=scorer),
            "every": VisualQualityR1Score(scorer=scorer, reduction="none"),
            "small": VisualQualityR1Score(scorer=small),
        }
    )
    tied, large = noise(2, 3, 56, 56), noise(2, 3, 112, 112)
    collection.update(tied)
    assert torch.equal(collection["mean"].scores[0], collection["small"].scores[0])
    assert sorted(map(sorted, collection.compute_groups.values())) == [["every", "mean"], ["small"]]
    del passes[:]
    collection.update(large)
    assert passes == [2, 2]
    values = collection.compute()
    assert values["mean"] != values["small"] and values["mean"] == values["every"].mean()
    assert float(values["small"]) == pytest.approx(float(visual_quality_r1_score([*tied, *large], small)), abs=2e-5)
    assert len(collection["every"].details()) == 4
    with pytest.raises(RuntimeError, match="compute_groups=False"):
        collection["mean"].details()
    collection(tied)
    assert len(collection["every"].compute()) == 6 and len(collection["mean"].scores) == 3
    collection.reset()
    collection.update(tied)
    assert len(collection["every"].compute()) == 2


def test_running(scorer, passes):
    running = Running(VisualQualityR1Score(scorer=scorer), window=2)
    images = noise(3, 3, 56, 56)
    values = [float(running(image)) for image in images]
    assert float(running.compute()) == pytest.approx(sum(values[1:]) / 2, abs=1e-6) and passes == [1, 1, 1]


def test_min_max(scorer):
    wrapped = MinMaxMetric(VisualQualityR1Score(scorer=scorer))
    images = noise(2, 3, 56, 56)
    wrapped.update(images[:1])
    first = wrapped.compute()["raw"]
    wrapped.update(images[1:])
    second = wrapped.compute()
    assert {float(second["min"]), float(second["max"])} == {float(first), float(second["raw"])}


@pytest.mark.filterwarnings("ignore:The default value for `maximize`:FutureWarning")  # torchmetrics before 1.7
def test_tracker(scorer):
    tracker = MetricTracker(VisualQualityR1Score(scorer=scorer), maximize=True)
    values = []
    for seed in range(3):
        tracker.increment()
        tracker.update(noise(1, 3, 56, 56, seed=seed))
        values.append(float(tracker.compute()))
    assert tracker.compute_all().tolist() == values
    best, step = tracker.best_metric(return_step=True)
    assert best == max(values) and step == values.index(max(values))
    assert all(metric.scorer is scorer for metric in list(tracker)[1:])


def test_bootstrapper(scorer):
    boot = BootStrapper(
        VisualQualityR1Score(scorer=scorer), num_bootstraps=3, sampling_strategy="multinomial", raw=True
    )
    images = noise(4, 3, 56, 56)
    boot.update(images)
    scores = visual_quality_r1_score(images, scorer, reduction="none")
    raw = boot.compute()["raw"]
    assert raw.shape == (3,) and bool(((raw >= scores.min() - 1e-4) & (raw <= scores.max() + 1e-4)).all())
    assert all(metric.scorer is scorer for metric in boot.metrics)


def test_composition(scorer):
    metric = VisualQualityR1Score(scorer=scorer)
    share = (metric - 1) / 4
    share.update(noise(2, 3, 56, 56))
    assert float(share.compute()) == pytest.approx((float(metric.compute()) - 1) / 4)


def test_bad_arguments(scorer):
    with pytest.raises(ValueError, match="reduction"):
        VisualQualityR1Score(scorer=scorer, reduction="sum")
    with pytest.raises(ValueError, match="reduction"):
        visual_quality_r1_score(noise(3, 56, 56), scorer, reduction="sum")
    with pytest.raises(ValueError, match="on_error"):
        VisualQualityR1Score(scorer=scorer, on_error="skip")
    with pytest.raises(ValueError, match="confidence_level"):
        VisualQualityR1Score(scorer=scorer, confidence_level=95)
    with pytest.raises(ValueError, match="Expected a scorer or mode, device, but got both"):
        VisualQualityR1Score(mode="think", scorer=scorer, device="cpu")
    with pytest.raises(ValueError, match="QualityScorer"):
        VisualQualityR1Score(scorer="nano")
    with pytest.raises(ValueError, match="QualityScorer"):
        visual_quality_r1_score(noise(3, 56, 56), "nano")
    with pytest.raises(ValueError, match="max_pixel"):
        VisualQualityR1Score(max_pixel=5)
    with pytest.raises(ValueError, match="mode to be one of"):
        VisualQualityR1Score("nano", "guess")


def test_arrays_of_sixteen_bits_too(scorer):
    grey = np.full((56, 56), 40_000, dtype=np.uint16)
    value = visual_quality_r1_score(grey, scorer)
    same = visual_quality_r1_score(torch.full((1, 56, 56), round(40_000 / 257), dtype=torch.uint8), scorer)
    assert value == same
