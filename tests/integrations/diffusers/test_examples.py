"""The diffusion examples, the benchmark and the document's code run, here with a tiny scoring model."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_matrix import difference
from PIL import Image
from tiny_pipelines import build

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore:.*was this model trained"
)


@pytest.fixture
def load(monkeypatch):
    """Import a script by its path, as Python would find its neighbours when it is started."""

    def load(path):
        script = ROOT / path
        monkeypatch.syspath_prepend(script.parent)
        spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_best_of_n_starts_as_its_documentation_says(tiny_qwen2_5_vl, tmp_path):
    options = ["--model", tiny_qwen2_5_vl, "--n", 6, "--keep", 2, "--steps", 5, "--size", 64]
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples/best_of_n.py"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dropped") == 3
    assert "inplace" in result.stdout
    assert f"{2 * (3 * 6 + 2 * 3)} denoiser rows" in result.stdout
    with Image.open(tmp_path / "best_of_n.png") as grid:
        assert grid.size == (128, 64 + 14)


def test_backpropagating_the_score_raises_it_on_held_out_seeds(load, tiny_qwen2_5_vl, tmp_path):
    example = load("examples/reward_backprop.py")
    options = ["--model", str(tiny_qwen2_5_vl), "--updates", "6", "--size", "32", "--device", "cpu"]
    before, after = example.main([*options, "--out", str(tmp_path / "strip.png")])
    assert after > before
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (8 * 32, 2 * 32)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_pictures_with_a_graph_are_those_of_the_pipe(load, family):
    example = load("examples/reward_backprop.py")
    tiny = build(family)
    weights = example.trainable(tiny.pipe, rank=0)
    pictures = {last: example.generate(tiny.pipe, [3, 4], last, **tiny.arguments) for last in (1, 6)}
    plain = [tiny.pipe(**tiny.arguments, generator=torch.Generator().manual_seed(s), output_type="np") for s in (3, 4)]
    gradients = {}
    for last, batch in pictures.items():
        for picture, output in zip(batch, plain, strict=True):
            assert difference(picture.detach().permute(1, 2, 0), output.images[0]) <= 1e-5
        gradients[last] = torch.cat([g.flatten() for g in torch.autograd.grad(batch.sum(), weights, allow_unused=True)
                                     if g is not None])  # fmt: skip
        assert gradients[last].norm() > 0
    assert not torch.allclose(gradients[1], gradients[6])
    with torch.no_grad():
        assert not example.generate(tiny.pipe, [3], 6, **tiny.arguments).requires_grad
    assert "forward" not in vars(example.denoiser_of(tiny.pipe))


def test_adapters_alone_are_trained(load):
    pytest.importorskip("peft")
    example = load("examples/reward_backprop.py")
    tiny = build("flux")
    weights = example.trainable(tiny.pipe, rank=2)
    named = dict(example.denoiser_of(tiny.pipe).named_parameters())
    assert {id(w) for w in weights} == {id(w) for name, w in named.items() if "lora" in name}
    example.generate(tiny.pipe, [3], 1, **tiny.arguments).sum().backward()
    assert any(w.grad is not None and float(w.grad.abs().sum()) > 0 for w in weights)
    assert all(w.grad is None for name, w in named.items() if "lora" not in name)


def test_benchmark_of_the_real_sizes_in_small(load, tmp_path):
    options = ["--sizes", "small", "--n", "4", "--repeats", "1", "--steps", "5", "--previews-at", "0.4"]
    options += ["--out", str(tmp_path / "out.csv")]
    load("benchmarks/best_of_n.py").main(options)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[2].startswith("n,strategy")
    rows = {tuple(line.split(",")[1:4]): int(line.split(",")[4]) for line in lines[3:]}
    assert rows["plain", "", "4"] == 2 * 4 * 5
    assert rows["restart", "0.4", "2"] == 2 * (4 * 3 + 2 * 5)
    assert rows["inplace", "0.4", "2"] == 2 * (4 * 3 + 2 * 2)
    assert sum(line.endswith(",equal") for line in lines) == 1


def test_benchmark_at_equal_rows(load, tmp_path):
    options = ["--sizes", "small", "--equal-rows", "--n", "4", "--repeats", "2", "--steps", "5"]
    load("benchmarks/best_of_n.py").main([*options, "--out", str(tmp_path / "out.csv")])
    lines = (tmp_path / "out.csv").read_text().splitlines()[3:]
    rows = {line.split(",")[1].strip('"'): int(line.split('",')[-1].split(",")[-5]) for line in lines}
    assert rows["plain"] == rows["particles"] == 2 * 4 * 5
    assert all(count <= 2 * 4 * 5 for count in rows.values())


def test_real_sizes_are_those_of_the_released_models(load, monkeypatch):
    """Counted on the meta device, where weights have a shape and no values."""
    real_sizes = load("benchmarks/real_sizes.py")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    pipe, _ = real_sizes.sdxl("full", "meta")
    scorer = real_sizes.scoring_model("full", "meta")
    modules = (pipe.unet, pipe.vae, scorer.model)
    assert [sum(w.numel() for w in m.parameters()) for m in modules] == [2_567_463_684, 83_653_863, 8_292_166_656]


@pytest.mark.slow
def test_benchmark(load, tiny_qwen2_5_vl, tmp_path):
    options = ["--model", str(tiny_qwen2_5_vl), "--n", "8", "--repeats", "2", "--out", str(tmp_path / "out.csv")]
    load("benchmarks/best_of_n.py").main(options)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[3].startswith(f"8,plain,,8,{2 * 8 * 20},1.0,")
    assert sum(line.endswith(",equal") for line in lines) == 1


def test_python_of_the_document(tiny_qwen2_5_vl, tmp_path, monkeypatch):
    """Everything but what downloads a pipeline."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/diffusers.md").read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "init_pipeline" not in block]
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    tiny = build("sd")
    names = {"pipe": tiny.pipe, "prompt": tiny.arguments["prompt"]}
    for block in blocks:
        code = block.replace('"TianheWu/VisualQuality-R1-7B", device="cuda"', repr(str(tiny_qwen2_5_vl)))
        code = re.sub(r"StableDiffusionXLPipeline.from_pretrained\(.*\)", "pipe", code)
        code = code.replace("num_images_per_prompt=4", "num_images_per_prompt=2, num_inference_steps=5")
        exec(code.replace("n=16", "n=4, num_inference_steps=5"), names)
    assert (tmp_path / "grid.png").exists()
    assert names["cb"].records
