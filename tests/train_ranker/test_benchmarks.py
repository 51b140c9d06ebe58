"""What the training experiments rest on: kept tokens are the tower's, differences are paired, the plot shows ranges."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.train_ranker.data import read_data
from vqr1_metric.train_ranker.processor import RankerProcessor


def test_kept_tokens_are_those_of_the_tower(tiny_qwen2_5_vl: Path, rated: Path) -> None:
    keep_tokens = importlib.import_module("benchmarks.training.ablation_nano").keep_tokens
    loaded = load_model(ModelSpec(str(tiny_qwen2_5_vl), device="cpu"))
    visual = loaded.model.model.visual.requires_grad_(False)
    processor = RankerProcessor(loaded, read_data([rated / "noise.csv"])[0].images)
    patches, grids = zip(*(processor.patches(i) for i in ("0", "1", "0", "2")), strict=True)
    inputs, grid = torch.cat(patches), torch.tensor(grids)
    expected = visual(inputs, grid_thw=grid).pooler_output
    seen, kept = [], {}
    visual.patch_embed.register_forward_hook(lambda *_: seen.append(1))
    keep_tokens(visual, kept)
    for _ in range(2):
        torch.testing.assert_close(visual(inputs, grid_thw=grid).pooler_output, expected, atol=1e-5, rtol=1e-5)
    assert len(seen) == len(kept) == 3


def test_the_summary_pairs_runs_of_one_seed() -> None:
    runs = {"start": [0.1], "base": [0.5, 0.6, 0.7], "exact": [0.52, 0.63, 0.74]}
    rows = [
        {"variant": name, "seed": str(seed), "srcc": str(value), "srcc_reply": str(value), "fidelity": "0.7"}
        for name, values in runs.items()
        for seed, value in enumerate(values)
    ]
    lines = importlib.import_module("benchmarks.training.ablation_nano").summary(rows).splitlines()
    assert lines[2] == "| start | 0.100 |  | 0.100 |  | 0.700 |  | 1 |"
    # Differences .02, .03, .04: standard error .01 / sqrt(3), Student's t for 2 degrees of freedom 4.303.
    assert lines[4] == "| exact | 0.630 | +0.030 ± 0.025 | 0.630 | +0.030 ± 0.025 | 0.700 | +0.000 ± 0.000 | 3 |"


def test_the_plot_of_two_sets_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "two.csv"
    lines = [f"{seed},{step},0.5{seed},0.9,0.8" for seed in (0, 1) for step in (0, 15)]
    table.write_text("\n".join(["seed,step,srcc_opinions,srcc_distortions,spread", *lines]) + "\n")
    importlib.import_module("benchmarks.training.two_sets").plot(table, tmp_path / "two.png")
    assert len(Image.open(tmp_path / "two.png").convert("RGB").getcolors(1 << 20)) > 50


def test_learning_curves_are_drawn_from_logs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = importlib.import_module("benchmarks.training.curves")
    log = [{"step": i, "fidelity": 0.7 + i / 100, "spread": 0.4} for i in range(1, 4)] + [{"step": 3, "eval_srcc": 0.6}]
    for name in ("a", "b/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": log}))
    (tmp_path / "a/data.json").write_text(json.dumps({"start": {"eval_srcc": 0.5}}))
    assert curves.read_log(tmp_path / "a")[0] == {"step": 0, "eval_srcc": 0.5}
    drawn = curves.plot([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    assert drawn == ["fidelity", "spread", "eval_srcc"]
    assert len(Image.open(tmp_path / "curves.png").convert("RGB").getcolors(1 << 20)) > 50
    with pytest.raises(SystemExit, match="holds no trainer_state"):
        curves.read_log(tmp_path)


def test_the_summary_of_the_distillation() -> None:
    rows = [
        {"variant": "ratings alone", "seed": str(seed), "srcc_teacher_start": "0.2", "srcc_people_start": "0.1",
         "srcc_teacher": f"0.{5 + seed}", "srcc_people": "0.4"} for seed in range(3)
    ]  # fmt: skip
    lines = importlib.import_module("benchmarks.training.distill").summary(rows).splitlines()
    assert lines[2] == "| nothing: the damaged student | 0.200 (0.200 to 0.200) | 0.100 (0.100 to 0.100) | 3 |"
    assert lines[3] == "| ratings alone | 0.600 (0.500 to 0.700) | 0.400 (0.400 to 0.400) | 3 |"
