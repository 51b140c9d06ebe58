"""The Python in docs/integrations.md runs, as far as its libraries are there; its links lead somewhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in TEXT.split("\n## ")[1:]}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


def run(section: str, model: Path) -> dict:
    """What the blocks of one section define."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(block.replace('"nano"', repr(str(model))), names)
    return names


def test_every_section_is_known() -> None:
    known = {"Lightning", "accelerate", "pyiqa", "BasicSR", "ComfyUI", "datasets", "Ray Data"}
    assert known <= set(SECTIONS)


def test_lightning(tiny_qwen2_5_vl: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    names = run("Lightning", tiny_qwen2_5_vl)
    assert len(names["callbacks"]) == 3
    model = names["Model"]()
    model.enlarge, model.log = (lambda batch: batch), (lambda *args, **kwargs: None)
    model.validation_step(torch.rand(2, 3, 56, 56), 0)
    assert 1 <= model.quality.compute() <= 5


def test_accelerate(tiny_qwen2_5_vl: Path) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(torch.rand(3, 3, 56, 56), batch_size=2))
    assert 1 <= run("accelerate", tiny_qwen2_5_vl)["validate"](accelerator, torch.nn.Identity(), loader) <= 5


def test_comfyui(tiny_qwen2_5_vl: Path) -> None:
    assert "VQR1Filter" in run("ComfyUI", tiny_qwen2_5_vl)["NODE_CLASS_MAPPINGS"]


def test_datasets(tiny_qwen2_5_vl: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pictures = Path(__file__).resolve().parents[2] / "examples" / "pictures"
    rows = datasets.Dataset.from_dict({"image": sorted(str(file) for file in pictures.iterdir())[:2]})
    scored = run("datasets", tiny_qwen2_5_vl)["add_scores"](rows)
    assert all(1 <= score <= 5 for score in scored["score"])


def test_ray_and_pyiqa_compile() -> None:
    # Run in test_ray.py and test_pyiqa.py, whose libraries a test environment may lack.
    for section in ("pyiqa", "Ray Data"):
        for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
            compile(block, section, "exec")
            for module in re.findall(r"from (vqr1_metric[\w.]*) import", block):
                assert find_spec(module)


def test_links() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert len(links) >= 6
    for link in links:
        assert (DOCUMENT.parent / link).exists(), link
