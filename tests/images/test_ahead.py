"""Files are decoded ahead, in order, within bounds; what was wrong with one is its own affair."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vqr1_metric.images import ImageError, ahead
from vqr1_metric.images.ahead import read_images


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(40):
        paths.append(tmp_path / f"{i:02}.png")
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(paths[-1])
    return paths


def test_pictures_come_in_order_whatever_they_are(files):
    files[3].write_bytes(b"nothing")
    mixed = [*files[:5], torch.full((3, 8, 8), 99, dtype=torch.uint8), files[6].read_bytes(), Image.open(files[7])]
    read = list(read_images(mixed))
    values = [pixels if isinstance(pixels, ImageError) else int(pixels[0, 0, 0]) for _, pixels in read]
    assert values[:3] + values[4:] == [0, 1, 2, 4, 99, 6, 7]
    assert isinstance(values[3], ImageError) and "03.png" in str(values[3])
    assert [name for name, _ in read][4:7] == [str(files[4]), "image 5", "image 6"]


def test_files_are_decoded_while_the_caller_works_and_not_too_many(files, monkeypatch):
    decoded = []
    load = ahead.load_image
    monkeypatch.setattr(
        ahead, "load_image", lambda image, name, floats: decoded.append(threading.get_ident()) or load(image)
    )
    monkeypatch.setattr(ahead, "AHEAD_PIXELS", 20 * 30 * 10)  # ten pictures of this size
    stream = read_images(files)
    next(stream)
    next(stream)
    deadline = time.monotonic() + 10
    while len(decoded) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 11 <= len(decoded) <= 2 + 10 + ahead._THREADS
    assert threading.get_ident() not in decoded
    stream.close()  # an abandoned stream leaves no thread behind
    assert not [t for t in threading.enumerate() if t.name.startswith("vqr1-decode")]


def test_tensors_are_not_read_ahead():
    taken = []
    stream = read_images(taken.append(i) or torch.zeros(3, 4, 4, dtype=torch.uint8) for i in range(50))
    next(stream)
    assert taken == [0]


def test_threads_leave_the_warning_filters_as_they_were(files):
    before = list(warnings.filters)
    for _ in range(5):
        assert len(list(read_images(files))) == 40
    assert warnings.filters == before
