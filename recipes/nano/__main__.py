"""Train nano from a folder of rated pictures.

    python -m recipes.nano --data labels.csv --images DIR --pristine DIR -o out/

First crops and their statistics are made (`prepare.py`, kept in `out/prepared/`) and a kernel machine says what it
expects of each (`teacher.py`). Then come the tower with a pooled head (`pretrain.py`), everything through the readout
(`finetune.py`), and the language model alone for larger pictures (`widen.py`). Each stage ends after its steps or its
minutes; `stage1.safetensors` and `stage2.safetensors` are written as it goes and `--start` goes on from one. The labels
need the columns image, split (train, val) and mos (0..1); only `train` is trained on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import widen
from .build import build_model, save_folder
from .data import Batches, load_folder, load_rated
from .finetune import finetune
from .prepare import prepare
from .pretrain import Clock, PooledHead, pretrain
from .start import centre_tokens, start_merger
from .teacher import Standard, components, cross_fitted
from .tokenizer import build_tokenizer
from .tower import FastTower

CROP = 256
OPINION_SHARE = 0.4
"""Weight of a picture's own opinion score in what its crops are trained on; the rest is what the teacher expects."""
SPREAD = 4.0
"""Clip of the statistics that the pooled head must tell."""


def lessons(prepared: Path, scores: np.ndarray, report=print) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the rated crops are trained on (crops,), and the statistics to tell of rated crops and ladders."""
    table = torch.from_numpy(np.load(prepared / "rated_statistics.npy"))
    picture = torch.from_numpy(np.load(prepared / "rated_picture.npy"))
    own = torch.from_numpy(scores)[picture]
    expected = cross_fitted(table, own, picture)
    report(f"teacher correlates {torch.corrcoef(torch.stack([expected, own]))[0, 1]:.3f} with opinions it has not seen")
    standard = Standard(table)
    directions, _ = components(standard(table))
    ladders = torch.from_numpy(np.load(prepared / "ladder_statistics.npy"))
    told = tuple((standard(part) @ directions).clamp(-SPREAD, SPREAD) for part in (table, ladders))
    return OPINION_SHARE * own + (1 - OPINION_SHARE) * expected, told


@torch.no_grad()
def start_from(visual: torch.nn.Module, head: PooledHead, prepared: Path, count: int = 2400, chunk: int = 24) -> None:
    """Fit the start of merger and head to (at most `count`) rated crops."""
    crops = np.load(prepared / "rated_crops.npy", mmap_mode="r")[:count]
    tower = FastTower(visual)

    def pictures():
        for first in range(0, len(crops), chunk):
            yield torch.from_numpy(np.array(crops[first : first + chunk])).permute(0, 3, 1, 2).contiguous()

    norm = visual.merger.ln_q
    start_merger(visual, torch.cat([norm(tower.patches(images)).mean(1) for images in pictures()]))
    head.start(torch.cat([tower(images).mean(1) for images in pictures()]))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CSV with the columns image, split, mos")
    parser.add_argument("--images", required=True, help="folder of the rated pictures")
    parser.add_argument("--pristine", required=True, help="folder of undistorted pictures for the ladders")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--crops", type=int, nargs=2, default=(10500, 2600), metavar=("RATED", "LADDERS"))
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 1100), metavar=("TOWER", "READOUT"))
    parser.add_argument("--minutes", type=float, nargs=2, default=(1e9, 1e9), metavar=("TOWER", "READOUT"))
    parser.add_argument("--rates", type=float, nargs=2, default=(1.5e-3, 8e-4), metavar=("TOWER", "READOUT"))
    parser.add_argument("--wide-steps", type=int, default=400, help="steps of the last stage")
    parser.add_argument("--rated-crops", type=int, default=20, help="rated crops in a batch")
    parser.add_argument("--ladders", type=int, default=4, help="ladders in a batch, five crops each")
    parser.add_argument("--start", help="stage1.safetensors or stage2.safetensors: go on with the stage after it")
    parser.add_argument("--every", type=int, default=50, help="steps between two report lines")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the recipe; returns the folder written."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    rated = load_rated(options.data, options.images, "train")
    size = min(CROP, rated.pictures.shape[1])
    prepare(
        rated, load_folder(options.pristine), size, options.crops, output / "prepared", options.seed, options.workers
    )
    opinions, targets = lessons(output / "prepared", rated.scores)
    del rated
    model, tokenizer = build_model(options.seed), build_tokenizer()
    head = PooledHead(model.config.vision_config.out_hidden_size, targets[0].shape[1])

    def keep(path: Path, state: dict[str, Tensor], average) -> None:
        state = {f"model.{name}": value for name, value in state.items() if name != "lm_head.weight"}  # tied
        state |= {f"head.{name}": value for name, value in average["head"].state_dict().items()}
        save_file({name: value.contiguous() for name, value in state.items()}, path)

    def restore(path: str | Path) -> None:
        stored = load_file(path)
        state = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
        model.load_state_dict(state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]})
        head.load_state_dict({n.removeprefix("head."): v for n, v in stored.items() if n.startswith("head.")})

    done = 0
    if not options.start:
        start_from(model.model.visual, head, output / "prepared")
    else:
        restore(options.start)
        done = int(Path(options.start).stem[-1])
    for stage in range(done, 2):
        if options.steps[stage] == 0:
            continue
        path = output / f"stage{stage + 1}.safetensors"

        def save(average, stage=stage, path=path):
            if stage == 0:
                state = dict(model.state_dict())
                state.update({f"model.visual.{n}": p for n, p in average["tower"].visual.state_dict().items()})
            else:
                state = average["readout"].model.state_dict()
            keep(path, state, average)

        dataset = Batches(
            output / "prepared", opinions, targets, options.rated_crops, options.ladders, options.seed * 1000 + stage
        )
        common = {
            "rate": options.rates[stage],
            "every": options.every,
            "checkpoint": save,
            "report": lambda line, stage=stage: print(f"stage {stage + 1} {line}", flush=True),
        }
        clock = Clock(options.steps[stage], options.minutes[stage], floor=0.05)
        batches = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4)
        if stage == 0:
            average = pretrain(model, batches, head, clock, **common)
            centre_tokens(average["tower"].visual, average["head"].norm)
        else:
            average = finetune(model, tokenizer, batches, head, clock, **common)
        save(average)
        restore(path)
    narrow = save_folder(model, output / "narrow")
    sources = ["--data", options.data, "--images", options.images, "--pristine", options.pristine]
    last = ["--steps", str(options.wide_steps), "--seed", str(options.seed)]
    return widen.main(["--model", str(narrow), *sources, "-o", str(output), *last])


if __name__ == "__main__":
    main()
