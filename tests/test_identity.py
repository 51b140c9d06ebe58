"""What decides a score is in `QualityScorer.identity()`, all of it, by content and as resolved."""

import inspect
import json
import os
import pickle
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from model_folders import CHANGES, change_file
from safetensors.torch import load_file, save_file

from vqr1_metric.backends import digests
from vqr1_metric.backends.base import ModelError, Sampling
from vqr1_metric.backends.http import HttpBackend
from vqr1_metric.backends.http.backend import QWEN2_5_VL_PIXELS
from vqr1_metric.backends.spec import EMBEDDED, ModelSpec
from vqr1_metric.backends.transformers import TransformersBackend
from vqr1_metric.functional.calibration import Calibration
from vqr1_metric.metric import VisualQualityR1Score
from vqr1_metric.scorer import QualityScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")

PICTURE = torch.rand(3, 56, 84, generator=torch.Generator().manual_seed(0))

#: Options that change no score, each with the reason.
HARMLESS = {
    "model": "a name or path: what is behind it is compared by content",
    "revision": "says which content is fetched",
    "device": "where the model runs; the dtype that follows from it is compared",
    "device_map": "where the model runs; the dtype that follows from it is compared",
    "batch_tokens": "how many pictures share a pass: speed and memory",
    "backend": "compared by its own identity",
    "key_variable": "lets the client in",
    "concurrency": "speed",
    "timeout": "an answer that is too late is no score",
    "tries": "an answer that fails is no score",
    "backoff": "waiting",
}
#: Another value for each option that decides a score, and what else must be set for it to count.
SCORER_OPTIONS = {
    "mode": "think",
    "dtype": "float64",
    "quantization": "8bit",
    "attn_implementation": "eager",
    "min_pixels": 5000,
    "max_pixels": 5000,
    "deterministic": True,
    "question": "levels",
    "data_range": (-1, 1),
    "clamp": True,
    "calibration": Calibration(2.0),
}
SAMPLING_OPTIONS = {
    "num_samples": 2,
    "temperature": 0.5,
    "top_k": 0,
    "top_p": 0.5,
    "max_new_tokens": 9,
    "seed": 1,
    "add_vision_id": False,
    "thinking": True,
}
SERVER_OPTIONS = {
    "base_url": "http://b/v1",
    "model": "large",
    "threshold": 0.1,
    "constrained": True,
    "fallback_samples": 2,
    "pixel_config": replace(QWEN2_5_VL_PIXELS, mean=(0.5, 0.5, 0.5)),
    "extra": {"priority": 1},
}


@pytest.fixture
def folder(tiny_qwen2_5_vl: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_qwen2_5_vl, tmp_path / "model")


def scorer(model: object = "nano", **options) -> QualityScorer:
    return QualityScorer(str(model), **{"device": "cpu", **options})


def remote(**options) -> QualityScorer:
    return QualityScorer(backend=HttpBackend(**{"base_url": "http://a/v1", "model": "tiny", **options}))


# ---------------------------------------------------------------- every option


def test_every_option_changes_the_identity_or_is_named_harmless(folder: Path) -> None:
    options = set(inspect.signature(QualityScorer.__init__).parameters) - {"self"}
    options |= {field.name for kind in (ModelSpec, Sampling) for field in fields(kind)}
    assert options == {*SCORER_OPTIONS, *SAMPLING_OPTIONS, *HARMLESS} & options
    plain = scorer(folder).identity()
    for name, value in SCORER_OPTIONS.items():
        assert scorer(folder, **{name: value}).identity() != plain, name
    sampled = scorer(folder, mode="sample").identity()
    for name, value in SAMPLING_OPTIONS.items():
        assert scorer(folder, mode="sample", **{name: value}).identity() != sampled, name
        assert scorer(folder, **{name: value}).identity() == plain, f"{name} decides nothing where nothing is sampled"


def test_every_option_of_a_server_changes_the_identity_or_is_named_harmless() -> None:
    options = set(inspect.signature(HttpBackend.__init__).parameters) - {"self"}
    assert options == {*SERVER_OPTIONS, *HARMLESS} & options
    plain = remote().identity()
    for name, value in SERVER_OPTIONS.items():
        assert remote(**{name: value}).identity() != plain, name
    harmless = {"key_variable": "OTHER", "concurrency": 1, "timeout": 1.0, "tries": 1, "backoff": 0.1}
    assert remote(**harmless).identity() == plain
    limited = QualityScorer(backend=HttpBackend("http://a/v1", "tiny"), max_pixels=5000)
    assert limited.identity() != plain


@pytest.mark.parametrize("name", CHANGES)
def test_every_file_changes_the_identity_of_another_scorer(folder: Path, name: str) -> None:
    before = scorer(folder).identity()
    change_file(folder / name)
    after = scorer(folder).identity()
    assert {key for key in before if before[key] != after[key]} == {CHANGES[name]}
    assert scorer(folder).fingerprint != QualityScorer("nano", device="cpu").fingerprint


def test_an_identity_is_json_and_a_fingerprint_a_number(folder: Path) -> None:
    for each in (scorer(folder), scorer(folder, mode="think", dtype=torch.bfloat16), remote(extra={"key": "s3cret"})):
        assert json.loads(json.dumps(each.identity())) == each.identity()
        assert 0 <= each.fingerprint < 2**48
        assert "s3cret" not in json.dumps(each.identity())
    assert set(scorer(folder).card()) == {"model", "revision", "identity"}


# ---------------------------------------------------------------- one thing, however it is named


def test_the_same_content_is_the_same_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    plain = scorer(folder).identity()
    same = {
        "a copy": scorer(copy),
        "a trailing slash": scorer(f"{folder}/"),
        "a relative path": scorer("model"),
        "a link": scorer(tmp_path / "link"),
        "its dtype": scorer(folder, dtype="float32"),
        "a dtype of torch": scorer(folder, dtype=torch.float32),
        "its attention": scorer(folder, attn_implementation="sdpa"),
        "its limits": scorer(folder, min_pixels=3136, max_pixels=12845056),
        "another batch size": scorer(folder, batch_tokens=7),
        "a thought that is not asked for": scorer(folder, thinking=True, num_samples=3),
        "a backend": QualityScorer(backend=TransformersBackend(ModelSpec(str(copy), device="cpu"))),
    }
    assert {name for name, each in same.items() if each.identity() != plain} == set()
    assert scorer("nano").identity() == scorer(EMBEDDED["nano"]).identity()
    assert scorer(folder, mode="think").identity() == scorer(folder, mode="think", thinking=True).identity()


def test_one_server_under_several_addresses() -> None:
    plain = remote().identity()
    for address in ("http://a/v1/", "http://a:80/v1", "HTTP://A/v1".lower()):
        assert remote(base_url=address).identity() == plain
    others = ("http://b/v1", "https://a/v1", "http://a:8000/v1", "http://a/other/v1")
    assert len({remote(base_url=address).fingerprint for address in others} | {remote().fingerprint}) == 5


def test_scores_of_copies_merge(folder: Path, tmp_path: Path) -> None:
    """As ranks of a distributed run with a copy on each machine do."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = VisualQualityR1Score(scorer=scorer(folder))
    second = VisualQualityR1Score(scorer=scorer(copy, dtype="float32", attn_implementation="sdpa", max_pixels=12845056))
    first.update(PICTURE[None])
    second.update(PICTURE[None])
    expected = float(first.compute())
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- a folder that changes


def test_an_overwritten_checkpoint_is_another_model_in_the_same_process(folder: Path) -> None:
    old = scorer(folder)
    metric = VisualQualityR1Score(scorer=old)
    metric.update(PICTURE[None])
    before = old.score(PICTURE)[0].score
    change_file(folder / "model.safetensors")
    new = scorer(folder)
    after = new.score(PICTURE)[0].score
    assert (
        after
        == QualityScorer(backend=TransformersBackend(ModelSpec(str(folder), device="cpu"))).score(PICTURE)[0].score
    )
    assert abs(after - before) > 1e-3
    assert old.score(PICTURE)[0].score == before and old.fingerprint != new.fingerprint
    other = VisualQualityR1Score(scorer=new)
    other.update(PICTURE[None])
    with pytest.raises(Exception, match="scores of one model with the same settings"):
        metric.merge_state(other)
    old.unload()
    assert old.score(PICTURE)[0].score == after and old.identity() == new.identity()


def test_a_folder_that_changes_before_the_weights_load_is_refused(folder: Path) -> None:
    """Once its identity has been compared; until then the metric has not looked at the model's files."""
    metric = VisualQualityR1Score(scorer=scorer(folder))
    metric.scorer.identity()
    change_file(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"have changed since this scorer was first used.*Make a new QualityScorer"):
        metric.update(PICTURE[None])


def test_content_is_noticed_whatever_the_clock_says(folder: Path) -> None:
    """The same size and time stamps; and a change within one tick of the clock."""
    path = folder / "model.safetensors"
    for _ in range(3):
        stat, before = path.stat(), scorer(folder).identity()
        change_file(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size and scorer(folder).identity() != before


def test_settled_files_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    before = scorer(folder).identity()
    monkeypatch.setattr(digests, "_hash", lambda *_: pytest.fail("hashed again"))
    assert scorer(folder).identity() == before


def test_a_large_file_is_sampled_in_every_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_HASH_WHOLE_BELOW", 0)
    path = folder / "model.safetensors"
    weights, seen = load_file(path), {digests.file_digest(path)}
    for name in weights:
        save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
        seen.add(digests.file_digest(path))
    assert len(seen) == len(weights) + 1


def test_shards_are_hashed_where_the_index_points(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    names = {name: f"parts/{i % 2}.safetensors" for i, name in enumerate(weights)}
    for part in set(names.values()):
        some = {name: weights[name] for name in weights if names[name] == part}
        save_file(some, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    before = scorer(folder)
    score = before.score(PICTURE)[0].score
    change_file(folder / "parts" / "1.safetensors")
    assert scorer(folder).identity()["weights"] != before.identity()["weights"]
    assert scorer(folder).score(PICTURE)[0].score != score


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_counts_and_its_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft comes with the extra 'train'")
    base = TransformersBackend(ModelSpec(str(folder), device="cpu")).model
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    seen = {scorer(folder).fingerprint, scorer(adapter).fingerprint}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 99}))
    seen.add(scorer(adapter).fingerprint)
    change_file(adapter / "adapter_model.safetensors")
    seen.add(scorer(adapter).fingerprint)
    last = scorer(adapter).identity()
    moved = shutil.copytree(folder, tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "lora_alpha": 99, "base_model_name_or_path": str(moved)})
    )
    assert scorer(adapter).identity() == last, "the base counts by content"
    change_file(moved / "tokenizer.json")
    seen.add(scorer(adapter).fingerprint)
    change_file(moved / "model.safetensors")
    seen.add(scorer(adapter).fingerprint)
    assert len(seen) == 6


# ---------------------------------------------------------------- beside it


def test_weights_in_memory_count_by_their_values(folder: Path) -> None:
    from vqr1_metric.backends.loading import load_model

    spec = ModelSpec(str(folder), device="cpu")
    loaded = replace(load_model(spec), identity=None)
    live = QualityScorer(backend=TransformersBackend(spec, loaded))
    before = live.identity()
    assert live.identity() == before
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.add_(1e-3)
    assert live.identity() != before


def test_weights_that_were_changed_since_they_loaded_are_others(folder: Path) -> None:
    backend = TransformersBackend(ModelSpec(str(folder), device="cpu"))
    live, before = QualityScorer(backend=backend), scorer(folder).identity()
    assert live.identity() == before
    with torch.no_grad():
        backend.model.get_output_embeddings().weight.add_(1e-3)
    assert live.identity()["weights"] not in (before["weights"], None)


def test_a_pickled_scorer_takes_the_files_as_it_finds_them(folder: Path) -> None:
    first = scorer(folder)
    assert pickle.loads(pickle.dumps(first)).identity() == first.identity()
    copy = pickle.dumps(first)
    change_file(folder / "tokenizer.json")
    assert pickle.loads(copy).identity() == scorer(folder).identity() != first.identity()


def test_no_weights_are_loaded_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqr1_metric.backends.loading.load_model", lambda spec: pytest.fail("loaded"))
    each = scorer(folder, max_pixels=5000)
    assert each.identity()["max_pixels"] == 5000 and each.fingerprint and not each.loaded
