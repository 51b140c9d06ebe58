"""The one command for a GPU, rehearsed on the CPU: every part leaves rows, a failure is a row, the table is written."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*only .*% of the model's answers"),
]


def rows_of(folder: Path, *parts: str) -> dict[tuple[str, str], str]:
    page = folder / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    gpu.main(["--rehearse", "-o", str(folder / "rows.csv"), "--write", str(page), "--parts", *parts])
    with (folder / "rows.csv").open(newline="") as file:
        return {(row["lane"], row["measure"]): row["value"] for row in csv.DictReader(file)}


def test_speed_has_a_floor_and_a_table(tmp_path: Path) -> None:
    found = rows_of(tmp_path, "machine", "one_pass", "batch_invariance", "offload", "differentiable", "device_map")
    assert not [key for key in found if key[1] in ("failed", "left out")]
    assert float(found["one pass, 112, batch 2", "speed"]) > 0
    assert float(found["one pass, 112, batch 2", "speed of the floor"]) > float(
        found["one pass, 112, batch 2", "speed"]
    )
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| one pass, 112, batch 2 |" in page


def test_a_step_with_lora_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = rows_of(tmp_path, "machine", "rl2r_step", "one_pass")
    assert float(found["RL2R step, LoRA 64, 8 images", "speed"]) > 0
    assert ("one_pass", "failed") not in found and float(found["one pass, 112, batch 1", "speed"]) > 0


def test_a_failing_part_is_a_row_and_late_ones_are_left_out() -> None:
    def broken(bench: gpu.Bench) -> Iterator[gpu.Row]:
        yield "begun", "speed", 1.0, "images/s"
        raise RuntimeError("out of order\nsecond line")

    bench = gpu.Bench("tiny", "cpu", 1, [], [], backend=object())
    found = list(gpu.attempt(broken, bench, end=float("inf")))
    assert found == [("begun", "speed", 1.0, "images/s"), ("broken", "failed", "RuntimeError: out of order", "")]
    assert list(gpu.attempt(broken, bench, end=0.0)) == [("broken", "left out", "the time was up", "")]


@pytest.mark.slow
def test_every_part(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = rows_of(tmp_path, *(part.__name__ for part in (*gpu.PARTS, *gpu.LAST)))
    assert not [key for key in found if key[1] in ("failed", "left out")]
