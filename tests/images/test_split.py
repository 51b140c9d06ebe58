"""Whatever holds images is taken for what it is, or refused with the line that works."""

import dataclasses
import io
import tempfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from vqr1_metric.images import ImageContractError, describe, iterate_images, load_image, split_images

BATCH = torch.rand(4, 3, 8, 8)


def png(level: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_batches_and_lists_of_anything():
    assert [part.shape for part in split_images(BATCH)] == [(3, 8, 8)] * 4
    assert len(split_images(np.zeros((2, 8, 8, 3), np.uint8))) == 2
    mixed = [BATCH[0], "a.png", np.zeros((8, 8), np.uint8), b"", Image.new("RGB", (8, 8))]
    assert all(a is b for a, b in zip(split_images(mixed), mixed, strict=True))
    assert split_images("a.png") == ["a.png"]
    assert split_images([]) == []
    assert split_images(torch.rand(0, 3, 8, 8)) == []
    assert split_images(name for name in ("a", "b")) == ["a", "b"]
    assert split_images(np.array(["a", "b"])) == ["a", "b"]


def test_files_are_images(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png())
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 0, 0)).save(buffer, "PNG")  # its position is at the end
    with path.open("rb") as opened, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(png())
        for file in (buffer, opened, spooled):
            assert split_images(file) == [file] == split_images([file])
            for _ in range(2):  # read from its beginning, each time
                assert load_image(file)[:, 0, 0].tolist() == [90, 0, 0]
        assert describe(opened) == str(path) and describe(buffer, 3) == "image 3"
    with path.open() as text, pytest.raises(ImageContractError, match=r"open\(path, 'rb'\)"):
        load_image(text)


def test_batches_of_batches():
    assert len(split_images([BATCH, BATCH[:2], BATCH[0]])) == 7
    assert len(split_images(DataLoader(BATCH, batch_size=3))) == 4
    assert split_images([["a", "b"], ("c",)]) == ["a", "b", "c"]
    taken = iterate_images(iter([BATCH, BATCH]))
    assert torch.equal(next(taken), BATCH[0])  # one batch after the other, as it comes


def test_a_folder_is_its_images(tmp_path):
    for name in ("b.png", "a.png", ".hidden.png", "notes.md"):
        (tmp_path / name).write_bytes(png())
    assert split_images(tmp_path) == split_images(str(tmp_path)) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageContractError, match="expected images in this folder"):
        split_images(tmp_path / "empty")


class Output(OrderedDict):
    """As diffusers' BaseOutput."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass
class Made:
    images: list


def test_a_pipelines_output():
    image = Image.new("RGB", (8, 8))
    assert split_images(Output(images=[image, image])) == [image, image] == split_images(Made([image, image]))
    assert len(split_images(Output(images=np.zeros((2, 8, 8, 3), np.float32)))) == 2
    assert split_images(([image, image],)) == [image, image]
    with pytest.raises(ImageContractError, match=r"output\.frames\[0\]"):
        split_images(Output(frames=[[image]]))
    for flags in (None, [False, True]):
        with pytest.raises(ImageContractError, match=r"return_dict=False: pass the first of it, x\[0\]"):
            split_images(([image, image], flags))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(8, 8), r"a tensor of shape \(B, C, H, W\) or \(C, H, W\), but got \(8, 8\)"),
        (torch.rand(1, 2, 3, 8, 8), r"video.*x\.flatten\(0, 1\)"),
        (np.zeros((1, 2, 8, 8, 3)), "video"),
        (5, "but got int"),
        (None, "but got NoneType"),
        ([BATCH[0], None], "item 1: expected an image, but got NoneType"),
        ([BATCH, torch.tensor([1, 0, 1, 0])], "for images, labels in loader"),
        (DataLoader(TensorDataset(BATCH, torch.arange(4)), batch_size=2), "for images, labels in loader"),
        (TensorDataset(BATCH), r"item\[0\] for item in data"),
        ({"image": BATCH}, r"keys image: pass x\['image'\]"),
        ([{"pixel_values": BATCH, "label": 1}], r"item 0: .*keys pixel_values, label: pass x\['pixel_values'\]"),
        ({"a.png": BATCH[0]}, "but got a dict"),
        ({"a.png", "b.png"}, r"no order: pass sorted\(x\)"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_line_that_works(given, message):
    with pytest.raises(ImageContractError, match=message):
        split_images(given)


def test_columns_are_taken_and_tables_are_not():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"image": ["a.png", "b.png"], "mos": [1, 2]})
    assert split_images(table["image"]) == ["a.png", "b.png"]
    with pytest.raises(ImageContractError, match=r"table\['image'\]"):
        split_images(table)
