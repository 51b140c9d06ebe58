"""The ComfyUI nodes, loaded as ComfyUI loads a folder of custom_nodes/, and the example workflow, run node by node."""

import importlib.util
import json
import math
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from stub_scorer import formula_scorer

from vqr1_metric import QualityScorer

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
WORKFLOW = json.loads((FOLDER / "example_workflows" / "best_of_batch.json").read_text())
NODES = ["VQR1Judge", "VQR1Score", "VQR1Compare", "VQR1BestOfBatch", "VQR1Filter", "VQR1Reasoning"]
pytestmark = pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers")


@pytest.fixture
def load():
    """What ``load_custom_node`` in ComfyUI's nodes.py does with an entry of custom_nodes/."""
    loaded = []

    def load_custom_node(path: Path, name: str) -> ModuleType:
        file = path if path.is_file() else path / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield load_custom_node
    for name in loaded:
        sys.modules.pop(name)
        sys.modules.pop(f"{name}.nodes", None)


@pytest.fixture
def module(load, tmp_path: Path) -> ModuleType:
    """The folder copied to custom_nodes/."""
    copy = shutil.copytree(FOLDER, tmp_path / "custom_nodes" / "vqr1")
    return load(copy, str(copy).replace(".", "_x_"))


@pytest.fixture
def nodes(module: ModuleType) -> dict:
    return {name: kind() for name, kind in module.NODE_CLASS_MAPPINGS.items()}


@pytest.fixture
def judge(tiny_qwen2_5_vl: Path, nodes: dict):
    return nodes["VQR1Judge"].run(str(tiny_qwen2_5_vl), "cpu", offload=True)[0]


def pictures(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 56, 56, 3)


def expected(judge, images: torch.Tensor) -> list[float]:
    return [result.score for result in QualityScorer(judge.scorer.spec.model).score(images.movedim(-1, 1))]


def by_formula(judge):
    """The same judge with a model whose scores differ widely."""
    return type(judge)(formula_scorer(), offload=False)


@pytest.mark.parametrize("name", ["vqr1", "/home/user/ComfyUI/custom_nodes/vqr1"])
def test_loads_by_either_name(load, name: str, tmp_path: Path) -> None:
    # ComfyUI named the module after the folder until 2024, and after the whole path since.
    module = load(shutil.copytree(FOLDER, tmp_path / "vqr1"), name)
    assert list(module.NODE_CLASS_MAPPINGS) == list(module.NODE_DISPLAY_NAME_MAPPINGS) == NODES


def test_loads_from_the_installed_package(load, tmp_path: Path) -> None:
    file = tmp_path / "vqr1.py"
    file.write_text(
        next(line.strip() for line in (FOLDER / "__init__.py").read_text().splitlines() if "from vqr1" in line)
    )
    assert list(load(file, "vqr1").NODE_CLASS_MAPPINGS) == NODES


@pytest.mark.parametrize("name", NODES)
def test_conventions(module: ModuleType, name: str) -> None:
    kind = module.NODE_CLASS_MAPPINGS[name]
    inputs = kind.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}
    for options in inputs["required"].values():
        assert isinstance(options, tuple) and isinstance(options[0], (str, list))
    assert callable(getattr(kind, kind.FUNCTION)) and kind.CATEGORY == "image/quality"
    assert kind.DESCRIPTION
    assert isinstance(kind.RETURN_TYPES, tuple) and len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
    assert len(getattr(kind, "OUTPUT_IS_LIST", kind.RETURN_TYPES)) == len(kind.RETURN_TYPES)


def test_judge(nodes: dict) -> None:
    (judge,) = nodes["VQR1Judge"].run(" nano ", "auto", offload=True)
    assert judge.scorer.spec.model == "nano" and judge.scorer.spec.device is None and not judge.scorer.loaded


def test_score(nodes: dict, judge) -> None:
    images = pictures()
    mean, scores, text = nodes["VQR1Score"].run(judge, images)
    assert scores == pytest.approx(expected(judge, images), abs=1e-5)
    assert mean == pytest.approx(sum(scores) / 4) and len(text.splitlines()) == 4
    assert nodes["VQR1Score"].run(judge, images * 1.5)[1] == pytest.approx(
        expected(judge, (images * 1.5).clamp(0, 1)), abs=1e-5
    )
    with_alpha = torch.cat([images, torch.ones(4, 56, 56, 1)], -1)
    assert nodes["VQR1Score"].run(judge, with_alpha)[1] == pytest.approx(scores, abs=1e-5)
    mean, scores, text = nodes["VQR1Score"].run(judge, torch.rand(1, 2, 500, 3))
    assert (
        math.isnan(mean) and math.isnan(scores[0]) and text.startswith("0: no score (image 0: 500x2 pixels is too thin")
    )


def test_compare(nodes: dict, judge) -> None:
    a, b = pictures(3), pictures(3)
    wins, text = nodes["VQR1Compare"].run(judge, a, b)
    scorer = QualityScorer(judge.scorer.spec.model)
    pairs = [scorer.compare(x, y) for x, y in zip(a.movedim(-1, 1), b.movedim(-1, 1), strict=True)]
    assert wins == pytest.approx([pair.win_probability for pair in pairs], abs=1e-5)
    assert len(text.splitlines()) == 3
    (win,), text = nodes["VQR1Compare"].run(judge, a[:1], a[:1])
    assert win == pytest.approx(0.5, abs=1e-5)
    assert "a coin toss" in text
    with pytest.raises(ValueError, match="as many pictures in a as in b, but got 3 and 2"):
        nodes["VQR1Compare"].run(judge, a, b[:2])


def test_best_of_batch(nodes: dict, judge) -> None:
    judge, images = by_formula(judge), pictures(5)
    scores = torch.tensor([result.score for result in judge.score(images)])
    best, text = nodes["VQR1BestOfBatch"].run(judge, images, 2)
    assert torch.equal(best, images[scores.argsort(descending=True)[:2]])
    assert text.startswith(f"{scores.argmax()}: {scores.max():.2f} (90 % between ")
    assert len(nodes["VQR1BestOfBatch"].run(judge, images, 100)[0]) == 5


def test_filter(nodes: dict, judge, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, images = by_formula(judge), pictures(5)
    scores = torch.tensor([result.score for result in judge.score(images)])
    threshold = float(scores.sort().values[2])
    passed, rejected, text = nodes["VQR1Filter"].run(judge, images, threshold)
    assert torch.equal(passed, images[scores >= threshold]) and torch.equal(rejected, images[scores < threshold])
    assert len(text.splitlines()) == 5

    class ExecutionBlocker:  # as in ComfyUI's comfy_execution/graph.py
        def __init__(self, message):
            self.message = message

    monkeypatch.setattr(sys.modules[f"{module.__name__}.nodes"], "ExecutionBlocker", ExecutionBlocker)
    passed, rejected, _ = nodes["VQR1Filter"].run(judge, images, 5.0)
    assert passed.message is None and len(rejected) == 5
    passed, rejected, _ = nodes["VQR1Filter"].run(judge, images, 1.0)
    assert len(passed) == 5 and isinstance(rejected, ExecutionBlocker)


def test_reasoning(nodes: dict, judge) -> None:
    images = pictures(2)
    (text,) = nodes["VQR1Reasoning"].run(judge, images)
    first, second = text.split("\n\n")
    # A random model never finishes a thought: the one-pass score is given, and it is said that there are no reasons.
    assert first.startswith(f"0: {expected(judge, images)[0]:.2f} (90 %") and first.endswith("gave no reasons.")
    assert second.startswith("1: ")


def test_reasoning_shows_the_reply_that_agrees(nodes: dict, judge, monkeypatch: pytest.MonkeyPatch) -> None:
    from vqr1_metric.protocol import ParsedReply
    from vqr1_metric.results import ImageScore

    plain = judge.scorer.score(pictures(1).movedim(-1, 1))[0]
    replies = [
        ParsedReply(1.0, None, "Blurred."),
        ParsedReply(plain.score, None, "Sharp enough."),
        ParsedReply(math.nan, "no", ""),
    ]
    monkeypatch.setattr(
        type(judge.scorer), "explain", lambda self, image: ImageScore.of("image", plain.distribution, replies)
    )
    (text,) = nodes["VQR1Reasoning"].run(judge, pictures(1))
    assert text.splitlines()[1] == "Sharp enough."


def test_workflow(module: ModuleType, tiny_qwen2_5_vl: Path) -> None:
    """Every link fits, every widget has its value, and our part runs; ComfyUI's own nodes are played by constants."""
    by_id = {node["id"]: node for node in WORKFLOW["nodes"]}
    assert {node["type"] for node in WORKFLOW["nodes"]} >= {"VQR1Judge", "VQR1Filter", "VQR1BestOfBatch"}
    for link, source, slot, target, place, kind in WORKFLOW["links"]:
        output, entry = by_id[source]["outputs"][slot], by_id[target]["inputs"][place]
        assert link in output["links"] and entry["link"] == link and output["type"] == kind
        assert entry["type"] in (kind, "*")
    values: dict[tuple[int, int], object] = {(6, 0): pictures(6)}  # VAEDecode
    origin = {link: (source, slot) for link, source, slot, *_ in WORKFLOW["links"]}
    for node in sorted(WORKFLOW["nodes"], key=lambda node: node["order"]):
        kind = module.NODE_CLASS_MAPPINGS.get(node["type"])
        if kind is None:
            continue
        wanted = kind.INPUT_TYPES()["required"]
        linked = {entry["name"]: values[origin[entry["link"]]] for entry in node["inputs"]}
        widgets = [name for name in wanted if name not in linked]
        assert [o["type"] for o in node["outputs"]] == list(kind.RETURN_TYPES)
        assert len(widgets) == len(node["widgets_values"])
        settings = dict(zip(widgets, node["widgets_values"], strict=True))
        if node["type"] == "VQR1Judge":
            assert settings["model"] == "nano"
            settings |= {"model": str(tiny_qwen2_5_vl), "device": "cpu"}
        if node["type"] == "VQR1Filter":
            settings["threshold"] = 1.0
        results = getattr(kind(), kind.FUNCTION)(**linked, **settings)
        values |= {(node["id"], slot): value for slot, value in enumerate(results)}
    saved = values[origin[next(node for node in WORKFLOW["nodes"] if node["type"] == "SaveImage")["inputs"][0]["link"]]]
    assert saved.shape == (2, 56, 56, 3)


def test_everything_is_packaged() -> None:
    settings = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["vqr1_metric.integrations.comfyui"]
    packaged = {file for pattern in patterns for file in FOLDER.glob(pattern)}
    assert packaged == {file for file in FOLDER.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
