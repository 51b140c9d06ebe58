"""The score in BasicSR's validation: what its models do with the ``val: metrics:`` of a yaml file.

    pip install basicsr
    python examples/basicsr_metric.py [--model nano]

In a real run the two lines that matter are the import of ``vqr1_metric.integrations.basicsr`` in your training script
and the entry ``vqr1`` in your yaml file.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml
from basicsr.metrics import calculate_metric
from PIL import Image

import vqr1_metric.integrations.basicsr  # noqa: F401 - registers calculate_vqr1

OPTIONS = """
val:
  metrics:
    psnr: {type: calculate_psnr, crop_border: 4, test_y_channel: false}
    vqr1: {type: calculate_vqr1, crop_border: 4, model: nano, better: higher}
"""


def read_bgr(file: Path) -> np.ndarray:
    """uint8 (H, W, 3), blue first: what BasicSR's ``tensor2img`` returns."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))[..., ::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    args = parser.parse_args()
    metrics = yaml.safe_load(OPTIONS)["val"]["metrics"]
    metrics["vqr1"]["model"] = args.model

    folder = Path(__file__).parent / "pictures"
    original = read_bgr(folder / "lake.jpg")
    for file in sorted(folder.glob("lake_*.jpg")):
        data = {"img": read_bgr(file), "img2": original}
        values = {name: calculate_metric(data, option) for name, option in metrics.items()}
        print(f"PSNR {values['psnr']:.2f} dB   score {values['vqr1']:.3f}   {file.name}")


if __name__ == "__main__":
    main()
