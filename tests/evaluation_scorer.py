"""Pictures whose quality is known and a backend that sees it, for tests of the evaluation."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqr1_metric.backends.pixels import PixelConfig
from vqr1_metric.functional.distribution import ScoreDistribution, score_grid


def save_picture(path: Path, red: float, size: tuple[int, int] = (40, 32)) -> Path:
    """A picture of some red with a pattern, so that every baseline has something to see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(round(red * 1000))
    pixels = np.empty((size[1], size[0], 3))
    pixels[..., 0] = red
    pixels[..., 1:] = 0.5 + red / 4 * random.standard_normal((size[1], size[0], 2))
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(path)
    return path


def write_xlsx(path: Path, rows: list[list[object]]) -> Path:
    """A workbook as Excel writes it: texts shared, numbers in place, empty cells left out."""
    texts = [cell for row in rows for cell in row if isinstance(cell, str)]
    sheet = []
    for number, row in enumerate(rows, 1):
        cells = []
        for column, cell in enumerate(row):
            place = f'r="{chr(65 + column)}{number}"'
            if isinstance(cell, str):
                cells.append(f'<c {place} t="s"><v>{texts.index(cell)}</v></c>')
            elif cell is not None:
                cells.append(f"<c {place}><v>{cell}</v></c>")
        sheet.append(f"<row>{''.join(cells)}</row>")
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
    data = f"<worksheet {space}><sheetData>{''.join(sheet)}</sheetData></worksheet>"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        archive.writestr("xl/worksheets/sheet1.xml", data)
    return path


class LinearBackend:
    """Scores a picture 1 + 4 times its mean red, with a spread of 0.3."""

    model_id, revision = "folder/linear", "1"
    pixel_config = PixelConfig(14, 2, 2, 3136, 1_000_000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self) -> None:
        self.pictures = 0
        self.sizes: list[tuple[int, int]] = []

    def sequence_length(self, visual_tokens: int, thinking: bool) -> int:
        return visual_tokens + 1

    def distributions(
        self, images: Sequence[Tensor], pixel_config: PixelConfig, *, replies: Sequence[str] | None = None
    ) -> ScoreDistribution:
        self.pictures += len(images)
        self.sizes += [tuple(image.shape[-2:]) for image in images]
        means = torch.stack([1 + 4 * image[0].float().mean() / 255 for image in images])
        return ScoreDistribution((-0.5 * ((score_grid() - means.unsqueeze(-1)) / 0.3) ** 2).softmax(-1))

    def sample_replies(self, images, pixel_config, sampling, *, thinking, add_vision_id):
        return [[f"<think>Red {i}.</think><answer>{3 + i / 10}</answer>" for i in range(2)] for _ in images]
