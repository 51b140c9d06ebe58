"""Score pictures through pyiqa, and raise the score of one by gradient ascent on its pixels.

pip install pyiqa
python examples/pyiqa_metric.py [--model nano] [FILE ...]
"""

import argparse
from pathlib import Path

import pyiqa
import torch

from vqr1_metric.images import load_image
from vqr1_metric.integrations.pyiqa import register


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default="nano")
    args = parser.parse_args()
    files = args.files or sorted((Path(__file__).parent / "pictures").iterdir())

    register()
    print("pyiqa knows", *pyiqa.list_models(filter="visualquality*"))
    metric = pyiqa.create_metric("visualquality_r1", model=args.model)
    pictures = [load_image(file)[None] / 255 for file in files]
    for file, picture in zip(files, pictures, strict=True):
        print(f"{metric(picture).item():.3f}  {file.name}")

    quality = pyiqa.create_metric("visualquality_r1", as_loss=True, model=args.model)
    pixels = pictures[0].requires_grad_()
    (-quality(pixels)).backward()
    step = (pixels - 1e-3 * pixels.grad.sign()).detach().clamp(0, 1)
    with torch.no_grad():
        print(f"{quality(step):.3f}  {files[0].name} after one step of 1/1000 of the range")


if __name__ == "__main__":
    main()
