"""Pictures as hostile input: whatever a file holds, ``load_image`` reads it or raises ImageError, in bounded time and
memory, and starts no other program."""

import io
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1_metric.images import FORMATS, ImageError, load_image

SCRIPT = Path(__file__).parent / "support" / "fuzz_pictures.py"


def fuzz(count: int, seed: int, folder: Path) -> dict:
    command = [sys.executable, SCRIPT, str(count), str(seed), folder]
    # No limit for the whole run: the script limits every file, in time of the processor, so that a busy machine is no
    # failure.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (folder / "number").read_text().strip() if (folder / "number").exists() else "none"
    assert done.returncode == 0, f"seed {seed}, file {last}, return code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def test_300_mutated_files(tmp_path: Path) -> None:
    found = fuzz(300, 0, tmp_path)
    assert found["read"] + found["refused"] == 300
    # Mutations that never reach a decoder, or that never break anything, would test nothing.
    assert found["read"] > 50 and found["refused"] > 100
    assert found["megabytes"] < 500


@pytest.mark.parametrize(
    ("hang", "clock", "kills"),
    [("while True: pass", 600, signal.SIGPROF), ("time.sleep(60)", 1, signal.SIGALRM)],
)
def test_a_hang_is_found(tmp_path: Path, hang: str, clock: int, kills: signal.Signals) -> None:
    """A decoder that computes without end, and one that waits without end."""
    code = f"""
import sys, time
from pathlib import Path
import fuzz_pictures

def hang(*_):
    {hang}

fuzz_pictures.SECONDS, fuzz_pictures.CLOCK, fuzz_pictures.load_image = 0.2, {clock}, hang
fuzz_pictures.run(1, 0, Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=SCRIPT.parent, check=False)
    assert done.returncode == -kills


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_10000_mutated_files(tmp_path: Path, seed: int) -> None:
    found = fuzz(10_000, seed, tmp_path)
    assert found["read"] + found["refused"] == 10_000
    assert found["megabytes"] < 1500, found


MEASURE = """
import json, sys, time
from pathlib import Path
from vqr1_metric.images import load_image

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

found = {}
for large in sorted(Path(sys.argv[1]).glob("*.large")):
    load_image(large.with_suffix(".small"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before, start = peak(), time.process_time()
    pixels = load_image(large)
    found[large.stem] = [(peak() - before) / pixels[0].numel(), time.process_time() - start]
    del pixels
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_small_multiple_of_the_pixels(tmp_path: Path) -> None:
    # A file of some kB may hold as many pixels as are allowed at all: what each costs bounds the memory.
    side, modes = 2500, ["RGB", "RGBA", "P", "I;16", "LA", "CMYK"]
    for mode in modes:
        values = np.full((side, side), 1000, np.uint16) if mode == "I;16" else None
        picture = Image.new(mode, (side, side)) if values is None else Image.fromarray(values)
        for name, saved in (("large", picture), ("small", picture.resize((8, 8)))):
            saved.save(tmp_path / f"{mode}.{name}", "TIFF" if mode == "CMYK" else "PNG")
    command = [sys.executable, "-c", MEASURE, tmp_path]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and is counted anew
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(modes)
    assert all(5 < bytes_each < 30 for bytes_each, _ in found.values()), found
    assert all(seconds < 10 for _, seconds in found.values()), found


def test_compressed_metadata_is_no_bomb() -> None:
    """100 MB of text or colour profile in a few kB of PNG."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    for kind, head in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"profile\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "navy").save(file, "PNG")
        good, body = file.getvalue(), kind + head + zeros
        chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        try:
            assert load_image(good[:33] + chunk + good[33:]).shape == (3, 32, 32)
        except ImageError:
            continue  # Pillow has limits of its own for these


def test_rare_formats_are_not_even_tried() -> None:
    assert {"EPS", "WMF", "PSD", "FITS", "PCX"}.isdisjoint(FORMATS)
    for kind in ("EPS", "PCX", "SGI", "ICNS"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), "navy").save(file, kind)
        with pytest.raises(ImageError, match=r"not a picture that Pillow can read|; convert it to PNG|; pass an array"):
            load_image(file.getvalue())


def test_postscript_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\n: > {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(program))
    file = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(file, "EPS")
    with Image.open(file) as opened, pytest.raises(subprocess.CalledProcessError):
        opened.load()
    assert marker.exists()  # so it would be, without a list of formats
    marker.unlink()
    with pytest.raises(ImageError):
        load_image(file)
    assert not marker.exists()
