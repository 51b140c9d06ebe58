"""Files and processes for tests of the evaluation; stub_scorer.LinearBackend sees the red of the pictures."""

import os
import socket
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


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


def run_processes(command: Sequence[str], folders: Sequence[Path]) -> list[list[str]]:
    """What a command prints in each folder, all at a time: alone in a folder named once, in one named twice as torchrun
    would start two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running: list[subprocess.Popen] = []
    try:
        for place, folder in enumerate(folders):
            folder.mkdir(parents=True, exist_ok=True)
            environment = {
                **os.environ,
                "RANK": str(folders[:place].count(folder)),
                "WORLD_SIZE": str(folders.count(folder)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parent),
            }
            pipe = subprocess.PIPE
            running.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
        outputs = []
        for process in running:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            outputs.append(output.splitlines())
        return outputs
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
