"""What the resting first half of the tower makes of every picture, computed once and kept on disk.

A pool holds pictures of one size: the map after the last resting block and the statistics tapped before it, in half
precision. Training draws windows from the maps, which are crops at no cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.nano.configuration import TOKEN_SIDE
from vqr1_metric.nano.modeling import NanoTower


@dataclass
class Item:
    """One entry of a pool.

    Args:
        group: pictures of one group are compared (a scene, a ladder).
        index: place of the picture in its set, -1 for ladders.
        mos: opinion or assumed score, NaN if there is none.
        level: strength in a ladder.
        name: the single distortion it shows, or None.
    """

    group: str
    index: int = -1
    mos: float = float("nan")
    level: float = 0.0
    name: str | None = None


@dataclass
class Pool:
    """Pictures of one size: ``maps (N, C, H, W)`` and ``statistics (N, S, rows, columns)``."""

    items: list[Item]
    maps: np.ndarray
    statistics: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.statistics.shape[2:])

    def load(self, places: Sequence[int], windows: Sequence[tuple[int, int]], size: tuple[int, int]):
        """Map and statistics of windows of ``size`` tokens, each beginning at its own row and column."""
        step = self.maps.shape[2] // self.statistics.shape[2]
        (rows, columns), maps, statistics = size, [], []
        for i, (top, left) in zip(places, windows, strict=True):
            maps.append(self.maps[i, :, top * step : (top + rows) * step, left * step : (left + columns) * step])
            statistics.append(self.statistics[i, :, top : top + rows, left : left + columns])
        stacked = (torch.from_numpy(np.stack(part)).float() for part in (maps, statistics))
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in stacked)


def resized(picture: Image.Image, config: PixelConfig) -> np.ndarray:
    """As scoring resizes it, uint8 ``(3, H, W)``."""
    height, width = config.target_size(picture.height, picture.width)
    values = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if (height, width) != tuple(values.shape[1:]):
        values = torch.nn.functional.interpolate(
            values[None].float(), (height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
        values = values.clamp(0, 255).round().byte()
    return values.numpy()


@torch.no_grad()
def see(tower: NanoTower, resting: int, shown: Iterable[tuple[np.ndarray, Item]], folder: Path, config: PixelConfig):
    """Run the first ``resting`` blocks over pictures; pools are written to ``folder`` by size."""
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[Path, dict[str, Any]] = {}
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (config.mean, config.std))
    with ExitStack() as stack:
        for values, item in shown:
            pixels = (torch.from_numpy(values)[None].float() - mean) / std
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            statistics = [tower.pixel_statistics(pixels)]
            maps = tower.run_blocks(tower.stem(pixels), range(resting), statistics)
            made = {"maps": maps[0].half(), "statistics": torch.cat(statistics, 1)[0].half()}
            name = folder / "x".join(str(side // TOKEN_SIDE) for side in values.shape[1:])
            if name not in told:
                files = {part: stack.enter_context(open(f"{name}.{part}", "wb")) for part in made}
                told[name] = {"items": [], "files": files} | {part: list(value.shape) for part, value in made.items()}
            told[name]["items"].append(asdict(item))
            for part, value in made.items():
                told[name]["files"][part].write(value.contiguous().numpy().tobytes())
    for name, one in told.items():
        del one["files"]
        Path(f"{name}.json").write_text(json.dumps(one))


def open_pools(folder: Path) -> list[Pool]:
    """Pools that :func:`see` wrote, mapped into memory."""
    pools = []
    for file in sorted(folder.glob("*.json")):
        told, name = json.loads(file.read_text()), str(file.with_suffix(""))
        items = [Item(**item) for item in told["items"]]
        arrays = (
            np.memmap(f"{name}.{part}", np.float16, "r", shape=(len(items), *told[part]))
            for part in ("maps", "statistics")
        )
        pools.append(Pool(items, *arrays))
    return pools


class Pictures(torch.utils.data.IterableDataset):
    """Lists of (picture, item), made by functions of a job's number, in worker processes."""

    def __init__(self, make, count: int, config: PixelConfig) -> None:
        self.make, self.count, self.config = make, count, config

    def __iter__(self) -> Iterator[tuple[np.ndarray, Item]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            for picture, item in self.make(number):
                yield resized(picture, self.config), item


def open_picture(path: Path) -> Image.Image:
    """RGB, upright."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
