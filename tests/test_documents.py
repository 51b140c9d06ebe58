"""What README and docs show works: Python runs on nano beside sample pictures, commands are ones that the program has,
links lead somewhere."""

import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from empty_torchvision import empty_torchvision
from PIL import Image

from vqr1_metric.cli import build_parser
from vqr1_metric.evaluation.agreement import STATISTICS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Sections whose Python is only compiled here, and why.
NOT_RUN = {
    "README.md: Pick the best of many generations": "a pipeline; examples/best_of_n.py runs",
    "docs/diffusers.md: diffusers: score, prune and rerank generations": "7B on a GPU; examples/best_of_n.py runs",
    "docs/diffusers.md: The callback": "pipelines of the Hub; tests/integrations/diffusers run it on tiny ones",
    "docs/training.md: Training a ranker": "minutes of training; examples/train_on_your_ratings.py runs on less",
}
#: Libraries that a section is about; without them it is skipped.
LIBRARIES = {
    "docs/integrations.md: Lightning": "lightning",
    "docs/integrations.md: pyiqa": "pyiqa",
    "docs/integrations.md: datasets": "datasets",
    "docs/serving.md: A model behind a server": "httpx",
}


def python_of(document: Path) -> dict[str, list[str]]:
    """The blocks of each section: fenced ones, and indented ones that begin with an import."""
    name = document.relative_to(ROOT).as_posix()
    title, fence, indented = name, None, False
    found: dict[str, list[str]] = {}
    for line in document.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
            if fence == "python":
                found.setdefault(title, []).append("")
        elif fence is not None:
            if fence == "python":
                found[title][-1] += line
        elif line.startswith("#"):
            title = f"{name}: {line.lstrip('#').strip()}"
        elif indented and line.startswith("    "):
            found[title][-1] += line[4:]
        elif indented := line.startswith(("    from ", "    import ")):
            found.setdefault(title, []).append(line[4:])
    return found


PYTHON = {title: blocks for document in DOCUMENTS for title, blocks in python_of(document).items()}


def _validate(names: dict) -> None:
    model = names["Model"]()
    model.enlarge, model.log = (lambda batch: batch), (lambda *args, **kwargs: None)
    model.validation_step(torch.rand(2, 3, 56, 56), 0)
    assert 1 <= model.quality.compute() <= 5 and len(names["callbacks"]) == 3


def _loop(names: dict) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(torch.rand(3, 3, 56, 56), batch_size=2))
    assert 1 <= names["validate"](accelerator, torch.nn.Identity(), loader) <= 5


def _map(names: dict) -> None:
    from datasets import Dataset

    scored = names["add_scores"](Dataset.from_dict({"image": ["photo.jpg", "other.jpg"]}))
    assert all(1 <= score <= 5 for score in scored["score"])


def _backward(names: dict) -> None:
    names["loss"].backward()
    assert names["images"].grad.abs().sum() > 0


#: What a section's Python needs to be there, and what is done with the functions and classes that it defines.
GIVEN: dict[str, Callable[[], dict]] = {
    "docs/questions.md: Rewards": lambda: {"images": torch.rand(2, 3, 56, 56)},
    "docs/scoring.md: As a loss": lambda: {"images": torch.rand(2, 3, 56, 56, requires_grad=True)},
}
THEN: dict[str, Callable[[dict], None]] = {
    "docs/integrations.md: Lightning": _validate,
    "docs/integrations.md: accelerate": _loop,
    "docs/integrations.md: datasets": _map,
    "docs/scoring.md: As a loss": _backward,
}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with the pictures that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("photo.jpg", "teal"), ("other.jpg", "olive")):
        Image.new("RGB", (120, 90), colour).save(name)
    shutil.copytree(ROOT / "examples" / "pictures", tmp_path / "photos")
    return tmp_path


def test_every_exception_is_there() -> None:
    assert set(NOT_RUN) | set(LIBRARIES) | set(GIVEN) | set(THEN) <= set(PYTHON)
    assert len(PYTHON) >= 12


@pytest.mark.filterwarnings("ignore:.*of the model's answers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning")
@pytest.mark.parametrize("title", PYTHON)
def test_python_runs(title: str, pictures: Path) -> None:
    code = [compile(block, title, "exec") for block in PYTHON[title]]
    if title in NOT_RUN:
        return
    if title in LIBRARIES:
        with empty_torchvision() if LIBRARIES[title] == "pyiqa" else nullcontext():
            pytest.importorskip(LIBRARIES[title], exc_type=ImportError)
    names: dict = {"__name__": "snippet", **GIVEN.get(title, dict)()}
    for block in code:
        exec(block, names)
    if title in THEN:
        THEN[title](names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_understood(document: Path) -> None:
    start = r"^ *(?:\w+=\S+ )?(?:torchrun .* -m vqr1_metric\.cli|vqr1) (?!COMMAND)(.*?)(?:  .*)?$"
    text = re.sub(r"\\\n\s*", "", document.read_text(encoding="utf-8"))
    for line in re.findall(start, text, re.MULTILINE):
        words = shlex.split(line.replace("PATH...", "PATH"), comments=True)
        assert build_parser(words[0]).parse_args(words).command == words[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link


def test_every_figure_of_the_evaluation_is_explained() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in STATISTICS)
