"""The nodes inside a real ComfyUI: its loader, its validation, its executor.

ComfyUI is no package, and asks for a torch of its own, so no test environment has it. To run these tests:

    git clone https://github.com/comfyanonymous/ComfyUI
    python -m venv comfy && comfy/bin/pip install -r ComfyUI/requirements.txt -e .
    COMFYUI=ComfyUI COMFYUI_PYTHON=comfy/bin/python pytest -m slow tests/integrations/test_comfyui_server.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from vqr1_metric import QualityScorer

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
WORKFLOW = FOLDER / "example_workflows" / "best_of_batch.json"
COMFYUI = os.environ.get("COMFYUI")
FILES = ["0.png", "1.png", "2.png"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="no COMFYUI (see the top of this file)"),
    pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has beside ComfyUI: our folder in custom_nodes/, and three pictures."""
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(FOLDER, base / "custom_nodes" / "vqr1")
    (base / "input").mkdir()
    rng = np.random.default_rng(0)
    for name, contrast in zip(FILES, (0.05, 1.0, 0.4), strict=True):
        noise = 127.5 + contrast * rng.uniform(-127, 127, (56, 84, 3))
        Image.fromarray(noise.astype(np.uint8)).save(base / "input" / name)
    return base


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--port", str(port)]
    command += ["--base-directory", base, "--disable-auto-launch", "--disable-api-nodes"]
    with (base / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=subprocess.STDOUT)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    client.get("/system_stats").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline, (base / "log").read_text()[-3000:]
                    time.sleep(0.5)
            yield client
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def scores(base: Path, tiny_qwen2_5_vl: Path) -> list[float]:
    results = QualityScorer(str(tiny_qwen2_5_vl)).score([base / "input" / name for name in FILES])
    return [result.score for result in results]


def run(server: httpx.Client, prompt: dict) -> dict[str, dict]:
    """What each output node showed or saved."""
    answer = server.post("/prompt", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    number = answer.json()["prompt_id"]
    deadline = time.monotonic() + 120
    while not (history := server.get(f"/history/{number}").json()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status = history[number]["status"]
    assert status["status_str"] == "success", status["messages"][-1]
    return history[number]["outputs"]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def batch(model: Path) -> dict[str, dict]:
    """A judge and the three pictures as one batch."""
    return {
        "judge": node("VQR1Judge", model=str(model), device="cpu", offload=True),
        **{name: node("LoadImage", image=name) for name in FILES},
        "two": node("ImageBatch", image1=["0.png", 0], image2=["1.png", 0]),
        "all": node("ImageBatch", image1=["two", 0], image2=["2.png", 0]),
    }


def shown(name: str, slot: int) -> dict:
    return node("PreviewAny", source=[name, slot])


def test_nodes_are_listed(server: httpx.Client) -> None:
    listed = server.get("/object_info").json()
    ours = {name: info for name, info in listed.items() if info["python_module"] == "custom_nodes.vqr1"}
    assert len(ours) == 6
    assert all(info["category"] == "image/quality" and info["description"] for info in ours.values())


def test_score_compare_and_reasons(server: httpx.Client, tiny_qwen2_5_vl: Path, scores: list[float]) -> None:
    prompt = batch(tiny_qwen2_5_vl) | {
        "score": node("VQR1Score", judge=["judge", 0], images=["all", 0]),
        "compare": node("VQR1Compare", judge=["judge", 0], a=["1.png", 0], b=["1.png", 0]),
        "reasons": node("VQR1Reasoning", judge=["judge", 0], images=["0.png", 0]),
        "mean": shown("score", 0),
        "each": shown("score", 1),
        "lines": shown("score", 2),
        "win": shown("compare", 0),
        "said": shown("compare", 1),
        "why": shown("reasons", 0),
    }
    texts = {name: output["text"] for name, output in run(server, prompt).items()}
    assert float(texts["mean"][0]) == pytest.approx(sum(scores) / 3, abs=1e-4)
    assert [float(text) for text in texts["each"]] == pytest.approx(scores, abs=1e-4)
    assert [line[:7] for line in texts["lines"][0].splitlines()] == [f"{i}: {s:.2f}" for i, s in enumerate(scores)]
    assert float(texts["win"][0]) == pytest.approx(0.5, abs=1e-4) and "a coin toss" in texts["said"][0]
    assert texts["why"][0].startswith(f"0: {scores[0]:.2f} (90 %")


@pytest.mark.parametrize("passing", [0, 2, 3])
def test_filter_and_best(
    server: httpx.Client, base: Path, tiny_qwen2_5_vl: Path, scores: list[float], passing: int
) -> None:
    """The node behind an output without pictures is skipped, all others run."""
    order = sorted(range(3), key=lambda i: -scores[i])
    bounds = [5.0, *(scores[i] for i in order), 1.0]
    threshold = (bounds[passing] + bounds[passing + 1]) / 2
    prompt = batch(tiny_qwen2_5_vl) | {
        "filter": node("VQR1Filter", judge=["judge", 0], images=["all", 0], threshold=threshold),
        "best": node("VQR1BestOfBatch", judge=["judge", 0], images=["filter", 0], count=1),
        "passed": node("SaveImage", images=["best", 0], filename_prefix=f"best{passing}"),
        "rejected": node("SaveImage", images=["filter", 1], filename_prefix=f"bad{passing}"),
        "text": shown("filter", 2),
    }
    outputs = run(server, prompt)
    assert len(outputs["text"]["text"][0].splitlines()) == 3
    assert ("passed" in outputs) == (passing > 0) and ("rejected" in outputs) == (passing < 3)
    if passing:
        (saved,) = outputs["passed"]["images"]
        with Image.open(base / "output" / saved["filename"]) as a, Image.open(base / "input" / FILES[order[0]]) as b:
            assert np.array_equal(a, b)
    if passing < 3:
        assert len(outputs["rejected"]["images"]) == 3 - passing


def test_example_workflow_is_offered_and_valid(server: httpx.Client) -> None:
    """ComfyUI lists it among the templates, and finds nothing wrong with it but the checkpoint that is not here."""
    assert server.get("/api/workflow_templates").json() == {"vqr1": ["best_of_batch"]}
    workflow = server.get("/api/workflow_templates/vqr1/best_of_batch.json").json()
    assert workflow == json.loads(WORKFLOW.read_text())
    origin = {link: [str(source), slot] for link, source, slot, *_ in workflow["links"]}
    listed, prompt = server.get("/object_info").json(), {}
    for each in workflow["nodes"]:
        linked = {entry["name"]: origin[entry["link"]] for entry in each.get("inputs", []) if entry["link"]}
        widgets = [name for name in listed[each["type"]]["input_order"]["required"] if name not in linked]
        # The frontend keeps what to do with a seed after each run beside the seed.
        values = [value for value in each.get("widgets_values", []) if value != "randomize"]
        prompt[str(each["id"])] = node(each["type"], **linked, **dict(zip(widgets, values, strict=bool(values))))
    answer = server.post("/prompt", json={"prompt": prompt})
    errors = answer.json()["node_errors"]
    assert answer.status_code == 400 and list(errors) == ["1"]
    assert [error["extra_info"]["input_name"] for error in errors["1"]["errors"]] == ["ckpt_name"]
