"""Train nano from a folder of rated pictures.

    python -m vqr1_metric.nano.training --data labels.csv --images DIR --pristine DIR -o out/

Three stages: the tower with a pooled head on crops; everything through the readout on crops; the language model
alone, on whole pictures and crops. Each stage ends after its steps or its minutes and leaves `stage1.pt` to `stage3.pt`
beside the model folder's files; `--start` goes on from such a file. The labels need the columns image, split (train,
val) and mos (0..1); only `train` is trained on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .build import build_model, save_folder, standardise_tokens
from .cached import TokenBatches
from .data import Batches, Rated, load_folder, load_rated
from .features import classical_features
from .finetune import finetune
from .pretrain import Clock, PooledHead, pretrain
from .tokenizer import build_tokenizer
from .tower import FastTower


def feature_statistics(rated: Rated, count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of the classical features over (at most `count`) rated pictures, each (119,)."""
    step = max(1, len(rated.pictures) // count)
    rows = [
        classical_features(torch.from_numpy(rated.pictures[i : i + 1].copy()).permute(0, 3, 1, 2))
        for i in range(0, len(rated.pictures), step)
    ]
    table = torch.cat(rows)
    return table.mean(0), table.std(0, correction=0) + 1e-3


def _loader(dataset: Batches, workers: int):
    prefetch = {"prefetch_factor": 6} if workers else {}
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, **prefetch)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m vqr1_metric.nano.training", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CSV with the columns image, split, mos")
    parser.add_argument("--images", required=True, help="folder of the rated pictures")
    parser.add_argument("--pristine", help="folder of undistorted pictures for the ladders")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, nargs=3, default=(2500, 2000, 0), metavar=("TOWER", "READOUT", "CACHED"))
    parser.add_argument(
        "--minutes", type=float, nargs=3, default=(1e9, 1e9, 1e9), metavar=("TOWER", "READOUT", "CACHED")
    )
    parser.add_argument(
        "--rates", type=float, nargs=3, default=(1e-3, 6e-4, 2e-4), metavar=("TOWER", "READOUT", "CACHED")
    )
    parser.add_argument("--crop", type=int, default=256, help="side of a training crop, a multiple of 128")
    parser.add_argument("--cached", type=int, nargs=2, default=(1500, 120), metavar=("RATED", "LADDERS"))
    parser.add_argument("--rated-crops", type=int, default=18, help="rated crops in a batch")
    parser.add_argument("--scenes", type=int, default=5, help="ladders in a batch, four rungs each")
    parser.add_argument("--start", help="stage1.pt or stage2.pt of an earlier run: go on with the stage after it")
    parser.add_argument("--every", type=int, default=50, help="steps between two report lines")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the recipe; returns the folder written."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    rated = load_rated(options.data, options.images, "train")
    pristine = load_folder(options.pristine) if options.pristine else []
    model, tokenizer = build_model(options.seed), build_tokenizer()
    head = PooledHead(model.config.vision_config.out_hidden_size, *feature_statistics(rated))
    done = 0
    if options.start:
        saved = torch.load(options.start, weights_only=True)
        model.load_state_dict(saved["model"])
        if saved["head"]:
            head.load_state_dict(saved["head"])
        done = saved["stage"]

    for stage in range(done, 3):
        if options.steps[stage] == 0:
            continue
        whole = rated.pictures.shape[1] // 128 * 128
        size = min(options.crop, whole)

        def save(average, stage=stage):
            state = dict(model.state_dict())
            if stage == 0:
                state.update({f"model.visual.{n}": p for n, p in average["tower"].visual.state_dict().items()})
            else:
                state = average["readout"].model.state_dict()
            kept = {"model": state, "head": average["head"].state_dict(), "stage": stage + 1}
            torch.save(kept, output / f"stage{stage + 1}.pt")

        common = {
            "rate": options.rates[stage],
            "every": options.every,
            "checkpoint": save,
            "report": lambda line, stage=stage: print(f"stage {stage + 1} {line}", flush=True),
        }
        if stage < 2:
            dataset = Batches(rated, pristine, size, options.rated_crops, options.scenes, features=24)
            dataset.seed = options.seed * 1000 + stage
            batches = _loader(dataset, options.workers)
        else:
            model.requires_grad_(True).model.visual.requires_grad_(False)
            head.requires_grad_(False)
            sizes = sorted({whole, size})
            batches = TokenBatches(FastTower(model.model.visual), rated, pristine, sizes, *options.cached)
        clock = Clock(options.steps[stage], options.minutes[stage], floor=0.1 if stage < 2 else 0.02)
        if stage == 0:
            average = pretrain(model, batches, head, clock, **common)
        else:
            average = finetune(model, tokenizer, batches, head, clock, **common)
        if stage == 0:
            standardise_tokens(average["tower"].visual, average["head"].norm)
        save(average)
        saved = torch.load(output / f"stage{stage + 1}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
    return save_folder(model, output)


if __name__ == "__main__":
    main()
