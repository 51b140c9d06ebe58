"""Teach the embedded model somebody's taste: from rated pictures to a ranker that the metric loads, on a CPU.

    python examples/train_on_your_ratings.py
    python examples/train_on_your_ratings.py --data ratings.csv --images FOLDER

Without ratings of your own it makes some: scenes rendered by code, and a viewer who likes the grain of film and cannot
bear compression. A model that has learnt what most people think marks grain down; after training it should not. The
same with the command line: vqr1 train --preset nano --data ratings.csv --images FOLDER -o my-ranker
"""

import argparse
import json
from pathlib import Path

from make_pictures import render

from vqr1_metric import VisualQualityR1Score
from vqr1_metric.images.distortions import distort
from vqr1_metric.train_ranker import RankerConfig, train

GRAIN, COMPRESSION = (0, 2, 4, 6), (0, 2, 4, 6)


def make_ratings(folder: Path, scenes: int) -> Path:
    """Pictures and ``ratings.csv`` with the columns image, mos (0 to 100), reference; 16 versions of each scene."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,mos,reference"]
    for scene in range(scenes):
        clean = render(seed=scene).resize((240, 160))
        for grain in GRAIN:
            for compression in COMPRESSION:
                picture = distort(clean, "grey_noise", grain, seed=scene) if grain else clean
                picture = distort(picture, "jpeg", compression) if compression else picture
                name = f"scene{scene}_grain{grain}_jpeg{compression}.png"
                picture.save(folder / name)
                lines.append(f"{name},{70 + 4 * grain - 10 * compression},scene{scene}")
    path = folder / "ratings.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and return the rank correlation with the held-out ratings before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="ratings: a table with the columns image and mos (default: made by code)")
    parser.add_argument("--images", help="folder of the pictures")
    parser.add_argument("--model", default="nano", help="model to start from")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--scenes", type=int, default=10, help="scenes to render")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("-o", "--output", type=Path, default=Path("my-ranker"))
    options = parser.parse_args(arguments)

    data = Path(options.data) if options.data else make_ratings(options.output / "pictures", options.scenes)
    config = RankerConfig.preset(
        "nano",
        model=options.model,
        data=[str(data)],
        images=[options.images] if options.images else [],
        output_dir=str(options.output / "model"),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        validation_fraction=0.2,  # of whole scenes, so that no scene is in both
    )
    model = train(config)

    before = json.loads((model / "data.json").read_text())["start"]["eval_srcc"]
    log = json.loads((model / "trainer_state.json").read_text())["log_history"]
    after = [entry["eval_srcc"] for entry in log if "eval_srcc" in entry][-1]
    print(f"rank correlation with held-out ratings: {before:.3f} before, {after:.3f} after")

    metric = VisualQualityR1Score(model=str(model))
    for picture in sorted(data.parent.glob("scene0_*_jpeg0.png")):
        metric.reset()
        metric.update([str(picture)])
        print(f"{float(metric.compute()):.2f}  {picture.name}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
