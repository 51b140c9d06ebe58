"""Distillation at nano's size: a damaged nano learns from the whole one, by distributions or means, beside ratings.

    python -m benchmarks.training.distill --rated labels.csv --images DIR --work DIR \\
        -o benchmarks/results/train_distill.csv

The teacher is nano; its score distributions of 240 photographs without their ratings are what is taught. The student is
nano with noise on every matrix of its language model (its tower rests), another draw for each seed. Ratings are those
of 60 of the photographs, as they are dear. Pictures are central squares of 256x256, reduced to 96x96. Each row is one
run: SRCC of the student's scores with the teacher's and with people's on 120 held-out photographs, before and after.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks.training.setup import append, log_of, provenance
from vqr1_metric import QualityScorer
from vqr1_metric.backends.loading import ModelSpec, load_model
from vqr1_metric.score_files import RecordWriter
from vqr1_metric.train_ranker.config import RankerConfig
from vqr1_metric.train_ranker.processor import RankerProcessor
from vqr1_metric.train_ranker.run import train

VARIANTS = {
    "ratings alone": {"objective": "fidelity", "teacher": []},
    "teacher's means": {"distill_loss": "mean", "data": []},
    "distributions, cross entropy": {"distill_loss": "cross_entropy", "data": []},
    "distributions, Wasserstein": {"distill_loss": "wasserstein", "data": []},
    "cross entropy and ratings": {"distill_loss": "cross_entropy"},
}


def small(path: Path) -> Image.Image:
    """The central square of a picture, small."""
    picture = Image.open(path).convert("RGB")
    left, top = ((side - 256) // 2 for side in picture.size)
    return picture.crop((left, top, left + 256, top + 256)).resize((96, 96), Image.Resampling.BOX)


def make_files(options: argparse.Namespace) -> dict[str, Path]:
    """Pictures, ratings and the teacher's scores below the work folder, unless they are there."""
    folder = options.work / "distill"
    names = {"ratings": "ratings.csv", "people": "people.csv", "teacher": "teacher.jsonl", "means": "nano.csv"}
    files = {name: folder / file for name, file in names.items()}
    if all(file.is_file() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    with open(options.rated, newline="") as stream:
        rows = list(csv.DictReader(stream))
    random = np.random.default_rng(0)
    chosen: dict[str, list[tuple[str, str]]] = {}
    for split, count in (("train", 240), ("val", 120)):
        of_split = [row for row in rows if row["split"] == split]
        chosen[split] = []
        for i in random.permutation(len(of_split))[:count]:
            name = Path(of_split[i]["image"]).stem + ".png"
            small(Path(options.images) / of_split[i]["image"]).save(folder / name)
            chosen[split].append((name, of_split[i]["mos"]))
    scorer = QualityScorer("nano", device="cpu")
    files["teacher"].unlink(missing_ok=True)
    with RecordWriter(files["teacher"]) as writer:
        for result in scorer.stream(folder / name for name, _ in chosen["train"]):
            writer.write(result)
    held_out = scorer.score([folder / name for name, _ in chosen["val"]])
    tables = {
        "ratings": chosen["train"][:60],
        "people": chosen["val"],
        "means": [(name, f"{r.score:.4f}") for (name, _), r in zip(chosen["val"], held_out, strict=True)],
    }
    for table, pairs in tables.items():
        lines = ["image,mos", *(f"{name},{mos}" for name, mos in pairs)]
        files[table].write_text("\n".join(lines) + "\n")
    return files


def damaged(folder: Path, damage: float, seed: int) -> Path:
    """nano with noise on the matrices of its language model, so many of their standard deviations."""
    if not (folder / "config.json").is_file():
        loaded = load_model(ModelSpec("nano", device="cpu"))
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in loaded.model.model.language_model.layers:
                for weight in layer.parameters():
                    if weight.ndim == 2:
                        weight += damage * weight.std() * torch.randn(weight.shape, generator=random)
        RankerProcessor(loaded, []).save_pretrained(folder)
        loaded.model.save_pretrained(folder)
    return folder


def run(variant: str, files: dict[str, Path], model: Path, seed: int, steps: int) -> dict[str, float]:
    """Figures before and after."""
    with TemporaryDirectory() as folder:
        settings = {
            "model": str(model),
            "data": [str(files["ratings"])],
            "teacher": [str(files["teacher"])],
            "validation": [str(files["people"]), str(files["means"])],
            "objective": "distill",
            "output_dir": f"{folder}/out",
            "images_per_device": 16,
            "images_per_comparison": 16,
            "max_steps": steps,
            "seed": seed,
            "learning_rate": 3e-4,
            "lr_scheduler": "linear",
            "kl_weight": 0.0,
            "freeze_vision": True,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "keep_best": False,
            "collapse_patience": 0,
            "validation_drop": 0.0,
        }
        output = train(RankerConfig.preset("nano", **{**settings, **VARIANTS[variant]}), tell=lambda line: None)
        first, *_, last = [entry for entry in log_of(output) if "eval_srcc_people" in entry]
    return {
        "srcc_teacher_start": first["eval_srcc_nano"],
        "srcc_people_start": first["eval_srcc_people"],
        "srcc_teacher": last["eval_srcc_nano"],
        "srcc_people": last["eval_srcc_people"],
    }


def summary(rows: list[dict[str, str]]) -> str:
    """Means over seeds, and their range, as a table."""
    lines = ["| learnt from | SRCC with the teacher | SRCC with people | seeds |", "|---|---|---|---|"]

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    starts = list({row["seed"]: row for row in rows}.values())
    told = [("nothing: the damaged student", starts, "_start")]
    told += [(name, [row for row in rows if row["variant"] == name], "") for name in VARIANTS]
    for name, of_one, suffix in told:
        if of_one:
            cells = [cell([float(row[f"srcc_{kind}{suffix}"]) for row in of_one]) for kind in ("teacher", "people")]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(of_one)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rated", required=True, help="labels of rated photographs: image, split, mos")
    parser.add_argument("--images", required=True, help="folder of these photographs")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and models")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file of the results")
    parser.add_argument("--damage", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--summary", action="store_true", help="only read the CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.summary:
        files = make_files(options)
        for seed in range(options.seeds):
            model = damaged(options.work / f"student-{options.damage:g}-{seed}", options.damage, seed)
            for variant in VARIANTS:
                found = run(variant, files, model, seed, options.steps)
                row = {"variant": variant, "seed": seed, "damage": options.damage, "steps": options.steps}
                rounded = {name: round(value, 4) for name, value in found.items()}
                print(json.dumps({**row, **rounded}), flush=True)
                append(options.output, {**row, **rounded, **provenance()})
    with options.output.open(newline="") as stream:
        print(summary(list(csv.DictReader(stream))))


if __name__ == "__main__":
    main()
