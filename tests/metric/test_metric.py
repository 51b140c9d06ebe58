"""`VisualQualityR1Score` and its functional twin on a tiny real model: one set of inputs, then every convention."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

from vqr1_metric import QualityScorer, VisualQualityR1Score, visual_quality_r1_score
from vqr1_metric.functional.intervals import mean_interval
from vqr1_metric.images import ImageContractError, ImageError

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
    metric = VisualQualityR1Score(scorer=scorer, dist_sync_on_step=dist_sync_on_step, keep_details=True)
    images = noise(4, 3, 56, 56)
    first, second = metric(images[:3]), metric(images[3:])
    assert passes == [3, 1] and metric.update_count == 2
    assert float(metric.compute()) == pytest.approx((3 * float(first) + float(second)) / 4, abs=1e-6)
    assert len(metric.details()) == 4 and passes == [3, 1]


def test_bad_pictures_lose_nothing_else(scorer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    good = noise(2, 3, 56, 56)
    metric = VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True)
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
    with pytest.warns(UserWarning, match=r"1 of 1 pictures have no score.*no such file"):
        assert visual_quality_r1_score(only_bad, scorer).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("call", ["update", "forward"])
def test_what_raises_leaves_what_was_stored(scorer, call, reduction, tmp_path):
    metric = VisualQualityR1Score(scorer=scorer, on_error="raise", keep_details=True, reduction=reduction)
    images = noise(2, 3, 56, 56)
    before = metric(images)
    with pytest.raises(ImageError, match=r"missing\.png"):
        getattr(metric, call)([images[0], tmp_path / "missing.png"])
    with pytest.raises(ImageContractError, match="clamp"):
        getattr(metric, call)(images * 1.1)
    assert torch.equal(metric.compute(), before) and len(metric.details()) == 2
    assert metric(images[:1]).isfinite().all() and len(metric.details()) == 3


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_empty_is_nan_with_a_warning(scorer):
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert VisualQualityR1Score(scorer=scorer).compute().isnan()
    metric = VisualQualityR1Score(scorer=scorer)
    with pytest.warns(UserWarning, match="Not one picture"):
        assert metric(torch.zeros(0, 3, 56, 56)).isnan()
    with pytest.warns(UserWarning, match="at least 5 scores, but there are 0"):
        assert all(bound.isnan() for bound in metric.confidence_interval())
    assert VisualQualityR1Score(scorer=scorer, reduction=None).compute().shape == (0,)
    assert metric.num_failed == 0
    kept = VisualQualityR1Score(scorer=scorer, keep_details=True)
    assert len(kept.distributions()) == 0 and kept.details() == []
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
    metric = VisualQualityR1Score(scorer=metric.scorer, keep_details=True)
    metric.update(images[:2])
    other = duplicate(metric)
    assert other.scorer.backend is metric.scorer.backend
    assert other.compute() == metric.compute() and len(other.details()) == 2
    before = metric.compute()
    other.update(images[2:])
    metric._computed = None
    assert metric.compute() == before and len(metric.details()) == 2 and len(other.details()) == 3
    assert other.compute() != before
    assert len(pickle.dumps(metric)) < 10_000  # two distributions and some bytes; the tiny model has 0.8 MB


def test_dtype_and_device_leave_the_scores_alone(metric):
    images = noise(3, 3, 56, 56)
    metric.update(images[:2])
    every = VisualQualityR1Score(scorer=metric.scorer, reduction="none", keep_details=True)
    every.update(images[:2])
    exact = every.compute()
    torch.nn.ModuleList([every]).half().to(torch.bfloat16)
    assert torch.equal(every.compute(), exact) and every.distributions().probabilities.dtype == torch.float32
    before, fingerprint = metric.compute(), metric.fingerprint.clone()
    metric.half().double().set_dtype(torch.float16)
    torch.nn.ModuleList([metric]).half().to(torch.bfloat16).to("cpu")
    metric.to(torch.float16)
    metric._computed = None
    assert metric.compute() == before and metric.compute().dtype == torch.float32
    assert torch.equal(metric.fingerprint, fingerprint) and metric.fingerprint.dtype == torch.int64
    metric.update(images[2:])
    assert metric.moments.dtype == torch.float32
    assert metric.to("meta").moments.device.type == "meta" and metric.scorer.backend.device.type == "cpu"


def test_autocast_changes_nothing(scorer, metric):
    images = noise(2, 3, 60, 84)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(images)
        twin = visual_quality_r1_score(images, scorer)
    assert metric.compute() == twin == visual_quality_r1_score(images, scorer)


def test_values_made_in_inference_mode_can_enter_a_loss(tiny_qwen2_5_vl):
    """Also if the weights were loaded there: the differentiable twin needs them outside of it."""
    scorer = QualityScorer(str(tiny_qwen2_5_vl), device="cpu", dtype="float32", attn_implementation="eager")
    metric = VisualQualityR1Score(scorer=scorer, keep_details=True)
    assert not scorer.loaded
    with torch.inference_mode():
        images = noise(6, 3, 56, 56)
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
    with pytest.raises(RuntimeError, match="keep_details=True"):
        VisualQualityR1Score(scorer=scorer).details()
    with pytest.raises(RuntimeError, match="keep_details=True"):
        VisualQualityR1Score(scorer=scorer).distributions()
    with pytest.warns(UserWarning, match="now keep_details"):
        old = VisualQualityR1Score(scorer=scorer, keep_distributions=True)
    expected = scorer.distributions(images)
    for metric in (VisualQualityR1Score(scorer=scorer, keep_details=True), old):
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
    every = VisualQualityR1Score(scorer=scorer, reduction="none", confidence_level=0.9)
    every.update(noise(12, 3, 56, 56))
    scores = every.compute()
    torch.testing.assert_close((low, high), mean_interval(scores, 0.9), atol=1e-6, rtol=0)
    torch.testing.assert_close((low, high), every.confidence_interval(), atol=1e-6, rtol=0)
    assert low < metric.compute() < high
    wider = metric.confidence_interval(0.99, num_bootstraps=1000, seed=1)
    assert wider[0] < low and wider[1] > high
    del passes[len(before) :]
    metric.confidence_interval()
    assert passes == before  # the model does not run for it
    with pytest.raises(ValueError, match="level"):
        metric.confidence_interval(95)
    few = VisualQualityR1Score(scorer=scorer)
    few.update(noise(4, 3, 56, 56))
    with pytest.warns(UserWarning, match="at least 5 scores, but there are 4"):
        assert all(end.isnan() for end in few.confidence_interval())


def test_merge_state(scorer, tiny_qwen2_5_vl):
    images = noise(3, 3, 56, 56)
    first, second = (VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True) for _ in range(2))
    first.update(images[:2])
    second.update(images[2:])
    assert first.compute().shape == (2,)
    first.merge_state(second)
    torch.testing.assert_close(
        first.compute(), visual_quality_r1_score(images, scorer, reduction="none"), atol=2e-5, rtol=0
    )
    assert len(first.details()) == 3
    empty = VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True)
    empty.merge_state(first.metric_state)
    assert torch.equal(empty.compute(), first.compute()) and len(empty.details()) == 3
    other = VisualQualityR1Score(
        str(tiny_qwen2_5_vl), max_pixels=5000, device="cpu", dtype="float32", reduction="none", keep_details=True
    )
    other.update(images[:1])
    with pytest.raises(ValueError, match="different ones"):
        first.merge_state(other)
    with pytest.raises(ValueError, match="moments"):
        VisualQualityR1Score(scorer=scorer).merge_state(first)
    mean, rest = (VisualQualityR1Score(scorer=scorer) for _ in range(2))
    mean.update(images[:2])
    rest.update(images[2:])
    mean.merge_state(rest)
    assert float(mean.compute()) == pytest.approx(float(first.compute().mean()), abs=2e-5)
    with pytest.raises(ValueError, match="metric_state"):
        first.merge_state([1.0])
    assert len(first.compute()) == 3


def test_a_checkpointed_state_knows_its_configuration(scorer, tiny_qwen2_5_vl):
    metric = VisualQualityR1Score(scorer=scorer, keep_details=True)
    metric.persistent(True)
    metric.update(noise(2, 3, 56, 56))
    state = metric.state_dict()
    assert set(state) == {"fingerprint", "moments", "failed", "records"}
    again = VisualQualityR1Score(scorer=scorer, keep_details=True)
    again.update(noise(3, 3, 60, 56, seed=9))
    again.load_state_dict(dict(state))
    assert [r.score for r in again.details()] == [r.score for r in metric.details()]  # not those of before
    again.update(noise(2, 3, 56, 56))
    assert float(again.compute()) == pytest.approx(float(metric.compute()), abs=1e-6)
    with pytest.raises(ValueError, match="different ones"):
        VisualQualityR1Score(str(tiny_qwen2_5_vl), "think", device="cpu", keep_details=True).load_state_dict(
            dict(state)
        )


def test_where_the_model_runs_is_no_part_of_the_configuration(tiny_qwen2_5_vl):
    """Or the ranks of a distributed run, which use one GPU each, would refuse each other."""
    metrics = [VisualQualityR1Score(str(tiny_qwen2_5_vl), device=d, dtype="float32") for d in ("cpu", "cpu:0", "meta")]
    assert len({metric.scorer.fingerprint for metric in metrics}) == 1
    automatic = [VisualQualityR1Score(str(tiny_qwen2_5_vl), device=device) for device in ("cpu", "meta")]
    assert automatic[0].scorer.fingerprint != automatic[1].scorer.fingerprint  # float32 here, bfloat16 there


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
    # The moments, the fingerprint and the values returned.
    assert stored() - before < 100
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
            "again": VisualQualityR1Score(scorer=scorer),
            "small": VisualQualityR1Score(scorer=small),
            "strict": VisualQualityR1Score(scorer=scorer, on_error="raise"),
            "clamped": VisualQualityR1Score(scorer=scorer, clamp=True),
            "every": VisualQualityR1Score(scorer=scorer, reduction="none", keep_details=True),
        }
    )
    tied, large = noise(2, 3, 56, 56), noise(2, 3, 112, 112)
    collection.update(tied)
    assert torch.equal(collection["mean"].moments, collection["small"].moments)
    groups = sorted(map(sorted, collection.compute_groups.values()))
    assert groups == [["again", "mean"], ["clamped"], ["every"], ["small"], ["strict"]]
    del passes[:]
    collection.update(large)
    assert passes == [2] * 5
    values = collection.compute()
    assert values["mean"] != values["small"] and values["mean"] == values["again"]
    assert float(values["mean"]) == pytest.approx(float(values["every"].mean()), abs=1e-6)
    assert float(values["small"]) == pytest.approx(float(visual_quality_r1_score([*tied, *large], small)), abs=2e-5)
    assert len(collection["every"].details()) == 4
    with pytest.warns(UserWarning, match="have no score"), pytest.raises(ImageError):
        collection.update(["nowhere.png"])
    collection(tied)
    assert len(collection["every"].compute()) >= 6
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
        visual_quality_r1_score(noise(3, 56, 56), 5)
    with pytest.raises(ValueError, match="data_range"):
        VisualQualityR1Score(scorer=scorer, data_range=(1, 0))
    with pytest.raises(TypeError, match=r"update\(preds=images"):
        VisualQualityR1Score(scorer=scorer).update(target=noise(1, 3, 56, 56))
    with pytest.raises(ValueError, match="max_pixel"):
        VisualQualityR1Score(max_pixel=5)
    with pytest.raises(ValueError, match="mode to be one of"):
        VisualQualityR1Score("nano", "guess")


def test_arrays_of_sixteen_bits_too(scorer):
    grey = np.full((56, 56), 40_000, dtype=np.uint16)
    value = visual_quality_r1_score(grey, scorer)
    same = visual_quality_r1_score(torch.full((1, 56, 56), round(40_000 / 257), dtype=torch.uint8), scorer)
    assert value == same


# ---------------------------------------------------------------- beside other metrics, in a user's program


class Tanh(VisualQualityR1Score):
    """A subclass that changes update alone, as torchmetrics' own tests do."""

    def update(self, preds, target=None):
        super().update((preds + 1) / 2)


def test_a_subclass_may_override_update_alone(scorer, passes):
    images = noise(3, 3, 56, 56)
    metric, plain = Tanh(scorer=scorer), VisualQualityR1Score(scorer=scorer)
    for batch in (images[:2], images[2:]):
        torch.testing.assert_close(metric(batch * 2 - 1, batch), plain(batch), atol=2e-5, rtol=0)
    assert passes == [2, 2, 1, 1]
    torch.testing.assert_close(metric.compute(), plain.compute(), atol=2e-5, rtol=0)
    collection = MetricCollection({"tanh": Tanh(scorer=scorer), "plain": VisualQualityR1Score(scorer=scorer)})
    half = torch.full((1, 3, 56, 56), 0.5)
    collection.update(half)
    assert len(collection.compute_groups) == 2


def test_beside_psnr_and_ssim(scorer):
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    collection = MetricCollection(
        {
            "psnr": PeakSignalNoiseRatio(data_range=1.0),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "vqr1": VisualQualityR1Score(scorer=scorer),
        }
    )
    sharp, blurred = noise(2, 3, 56, 56), noise(2, 3, 56, 56, seed=1)
    collection.update(sharp, blurred)
    collection.update(preds=sharp, target=blurred)
    values = collection.compute()
    assert float(values["vqr1"]) == pytest.approx(float(visual_quality_r1_score(sharp, scorer)), abs=2e-5)
    assert len({float(value) for value in collection(sharp, target=blurred).values()}) == 3
    assert collection["psnr"].update_count == collection["vqr1"].update_count == 3


def test_the_state_of_a_mean_does_not_grow(scorer, monkeypatch):
    results = scorer.score(noise(1, 3, 56, 56))
    metric, sizes = VisualQualityR1Score(scorer=scorer), []
    for count in (10, 2000):
        metric.update(results * count)
        sizes.append(len(pickle.dumps(metric)))
    assert metric.compute() == pytest.approx(results[0].score, abs=1e-6)
    assert abs(sizes[1] - sizes[0]) < 200 and sum(state.numel() for state in metric.metric_state.values()) < 20


def test_a_pickled_result_is_its_own_and_not_a_batch(scorer):
    results = scorer.score(noise(8, 3, 56, 56))
    assert len(pickle.dumps(results[3])) < 3500


def test_warnings_name_the_callers_line_and_come_back_after_reset(scorer, tmp_path):
    metric = VisualQualityR1Score(scorer=scorer)
    missing = [tmp_path / "missing.png", noise(3, 56, 56)]
    for _ in range(2):  # with Python's own filter too, which drops what it has shown at a line
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.filterwarnings("ignore", message=".*of the model's answers")
            metric.update(missing)
            line = sys._getframe().f_lineno - 1
            metric.update(missing)
            metric(missing)
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
        assert "1 of 2 pictures have no score" in str(caught[0].message)
        assert metric.num_failed == 3
        metric.reset()


def test_wrong_tensors_raise_at_once_everywhere(scorer):
    images = torch.cat([noise(1, 3, 56, 56), noise(1, 3, 56, 56) * 1.2])
    metric = VisualQualityR1Score(scorer=scorer)
    for call in (
        metric.update,
        metric,
        scorer.score,
        lambda x: next(scorer.stream(x)),
        scorer.distributions,
        scorer.rank,
        lambda x: visual_quality_r1_score(x, scorer),
        lambda x: visual_quality_r1_score(x, scorer, differentiable=True),
    ):
        with pytest.raises(ImageContractError, match=r"1 of 2 images, the first of them image 1: .*clamp=True"):
            call(images)
    assert metric.update_count <= 1 and int(metric.moments[0].sum()) == 0
    clamped = visual_quality_r1_score(images.clamp(0, 1), scorer)
    assert visual_quality_r1_score(images, scorer, clamp=True) == clamped
    assert VisualQualityR1Score(scorer=scorer, clamp=True)(images) == clamped
    assert scorer.replace(clamp=True).distributions(images).mean.mean() == clamped


def test_data_range(scorer):
    images = noise(2, 3, 56, 56)
    expected = visual_quality_r1_score(images, scorer)
    for data_range, given in (((-1, 1), images * 2 - 1), (255, images * 255)):
        values = [visual_quality_r1_score(given, scorer, data_range=data_range)]
        values.append(VisualQualityR1Score(scorer=scorer, data_range=data_range)(given))
        torch.testing.assert_close(torch.stack(values), expected.expand(2), atol=2e-5, rtol=0)


def test_nan_pixels_are_data(scorer):
    images = noise(2, 3, 56, 56)
    images[1, 0, 0, 0] = torch.nan
    metric = VisualQualityR1Score(scorer=scorer, keep_details=True)
    with pytest.warns(UserWarning, match="1 of 2 pictures have no score.*image 1: expected finite values"):
        metric.update(images)
    assert metric.num_failed == 1 and metric.compute().isfinite() and "finite" in metric.details()[1].error


def test_a_forgotten_differentiable_is_said_once_for_a_line(scorer):
    images = noise(1, 3, 56, 56).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".*of the model's answers")
        for _ in range(3):
            visual_quality_r1_score(images, scorer)
        visual_quality_r1_score(images.detach(), scorer)
        visual_quality_r1_score(images, scorer, differentiable=True)
        with torch.no_grad():
            visual_quality_r1_score(images, scorer)
    assert len(caught) == 1 and "differentiable=True" in str(caught[0].message) and caught[0].filename == __file__


def test_the_functional_takes_the_name_of_a_model(scorer, tiny_qwen2_5_vl):
    images = noise(1, 3, 56, 56)
    value = visual_quality_r1_score(images, str(tiny_qwen2_5_vl))
    assert float(value) == pytest.approx(float(visual_quality_r1_score(images, scorer)), abs=0.05)


def test_folders_and_open_files(scorer, tmp_path):
    import io

    for level in (40, 200):
        Image.new("RGB", (56, 56), (level,) * 3).save(tmp_path / f"{level}.png")
    metric = VisualQualityR1Score(scorer=scorer, reduction="none")
    metric.update(tmp_path)
    metric.update(io.BytesIO((tmp_path / "40.png").read_bytes()))
    scores = metric.compute()
    assert len(scores) == 3 and float(scores[2]) == pytest.approx(float(scores[1]), abs=2e-5)  # 200.png sorts first
    assert [result.name for result in scorer.stream(str(tmp_path / "40.png"))] == [str(tmp_path / "40.png")]


def test_states_on_the_cpu_under_nccl_are_refused_at_the_first_picture(scorer, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group=None: "nccl")
    metric = VisualQualityR1Score(scorer=scorer)
    with pytest.raises(RuntimeError, match=r"metric\.to\(device\)"):
        metric.update(noise(1, 3, 56, 56))
    VisualQualityR1Score(scorer=scorer, sync_on_compute=False).update(noise(1, 3, 56, 56))
