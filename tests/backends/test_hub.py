"""Models on the Hub: which of the causes it is that one cannot be had, what was meant, and what is downloaded."""

import shutil
import socket
from pathlib import Path

import pytest
from fake_hub import COMMIT, TOKEN, Hub, serving_hub
from huggingface_hub import constants

from vqr1_metric.backends import hub
from vqr1_metric.backends.base import ModelError
from vqr1_metric.backends.checkpoints import CHECKPOINTS, known_spellings, markdown, near_names
from vqr1_metric.scorer import DEFAULT_MODEL

NAME = "TianheWu/VisualQuality-R1-7B"


def fetch(home: Path, name: str, revision: str | None = None, *, endpoint: str = "", offline: bool = False) -> str:
    """The folder of a model, or what is said instead, as a fresh process with this environment has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(constants, "ENDPOINT", endpoint or "http://127.0.0.1:9")
        of_file = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"  # made of it at import
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", of_file)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.fetch.cache_clear()
        try:
            return str(hub.fetch(name, revision))
        except ModelError as error:
            return str(error)
        finally:
            hub.fetch.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_model_is_downloaded_once_and_found_offline(tiny_qwen2_vl: Path, home: Path, tmp_path: Path) -> None:
    """Only what a model consists of; no code, no pickled weights."""
    published = shutil.copytree(tiny_qwen2_vl, tmp_path / "published")
    for name in ("modeling.py", "pytorch_model.bin", "README.md"):
        (published / name).write_text("not wanted")
    stand_in = Hub({NAME: published})
    with serving_hub(stand_in) as address:
        folder = Path(fetch(home, NAME, endpoint=address))
        assert folder.name == COMMIT
        wanted = {file.name for file in tiny_qwen2_vl.iterdir()}
        assert {file.name for file in folder.iterdir()} == wanted
        stand_in.asked.clear()
        assert fetch(home, NAME, "main", endpoint=address) == str(folder)
        assert not [path for path in stand_in.asked if "/resolve/" in path]
    assert fetch(home, NAME, offline=True) == str(folder)
    assert fetch(home, NAME, endpoint=address) == str(folder)  # nobody is there any more
    with serving_hub(Hub({}, down=503)) as address:
        assert fetch(home, NAME, endpoint=address) == str(folder)


def test_the_causes_are_told_apart(tiny_qwen2_vl: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_hub(Hub({NAME: tiny_qwen2_vl}, gated=(NAME,))) as address:
        served = {"endpoint": address}
        missing = fetch(home, "nobody/nothing", **served)
        near = fetch(home, "VisualQuality-R1", **served)
        gated = fetch(home, NAME, **served)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        token = fetch(home, NAME, **served)
        monkeypatch.delenv("HF_TOKEN")
        revision = fetch(home, NAME, "v9", **served)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        allowed = fetch(home, NAME, **served)
        monkeypatch.delenv("HF_TOKEN")
    assert "has no such model" in missing and "private model" in missing and "Did you mean" not in missing
    assert "Did you mean 'TianheWu/VisualQuality-R1-7B'" in near
    assert f"asks for terms to be accepted first. Do so at {address}/{NAME}" in gated and "HF_TOKEN" in gated
    assert "does not accept your access token" in token and "hf_wrong" not in token
    assert "at revision 'v9': " in revision and "no such branch, tag or commit" in revision
    assert Path(allowed).name == COMMIT
    with serving_hub(Hub({}, down=503)) as address:
        down = fetch(home / "2", NAME, endpoint=address)
    assert "is down or busy (it answered 503). Try again later." in down
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = fetch(home / "2", NAME, endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "cannot be reached" in closed and "HF_ENDPOINT" in closed
    offline = fetch(home / "2", NAME, offline=True)
    assert "HF_HUB_OFFLINE forbids to ask" in offline
    invalid = fetch(home / "2", "not a valid name!", endpoint=address)
    assert "the Hub can hold no such name" in invalid
    answers = {missing, gated, token, revision, down, closed, offline, invalid}
    assert len(answers) == 8 and all(len(answer.splitlines()) == 1 for answer in answers)
    assert all("nano" in answer for answer in (down, closed, offline))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("VisualQuality-R1", NAME),
        ("TianheWu/VisualQuality-R1", NAME),
        ("visualquality-r1-7b", NAME),
        ("TianheWu/VisualQualityR1-7B", NAME),
        ("TianheWu/VisualQuality-R1-7B-previw", f"{NAME}-preview"),
        ("nanno", "nano"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_near_names(written: str, meant: str) -> None:
    assert near_names(written)[0] == meant


@pytest.mark.parametrize("written", ["", "/", "x", "nobody/nothing", "/data/models/checkpoint-100", "gpt2"])
def test_no_name_is_offered_for_what_is_like_none(written: str) -> None:
    assert near_names(written) == []


def test_the_table_is_that_of_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert "\n".join(markdown()) in page
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert len(set(names)) == len(names) and DEFAULT_MODEL in names and "nano" in names
    assert known_spellings("of no weights") is None
