"""Names written on one line and read back, byte for byte."""

import os
import random
import sys

import pytest

from vqr1_metric.images.names import ImageKeys, escape_name, printable, unescape_name

NAMES = [
    "a.png",
    "new\nline.png",
    "new\\nline.png",
    "caf\udce9.png",
    "caf\\udce9.png",
    "\\",
    "\\\\n",
    "\\\n",
    "\x1b[31mred.png",
    "a\u2028b\x85c\x0bd\x0ce\x1cf.png",
    "right\u202eleft.png",
    "größe 写真 🖼.png",
    "'=1.png",
    "\0",
]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str):
    written = escape_name(name)
    assert unescape_name(written) == name
    assert len(written.splitlines()) == 1
    written.encode()  # is text
    assert all(character.isprintable() for character in written)


def test_plain_names_stay():
    for name in ("a.png", "größe 写真.png", "dir/sub dir/b,c;d.png", "#1.png"):
        assert escape_name(name) == printable(name) == name
    assert printable("C:\\new\x1b") == "C:\\new\\u001b"


def test_random_names_keep_their_bytes():
    rng = random.Random(0)
    written = {}
    for _ in range(3000):
        data = bytes(rng.choice((92, 110, 10, 117, 48, 0xED, rng.randrange(1, 256))) for _ in range(rng.randint(1, 12)))
        text = escape_name(os.fsdecode(data))
        assert os.fsencode(unescape_name(text)) == data
        assert written.setdefault(text, data) == data  # no two names are written alike


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_keys_are_of_places(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    keys = ImageKeys()
    same = ["real/a.png", "./real//a.png", f"{tmp_path}/real/a.png", "link/a.png", "link/../real/a.png"]
    assert len({keys.key(name) for name in same}) == 1
    assert ImageKeys(tmp_path / "real").key("a.png") == keys.key("real/a.png")
    others = ["a.png", "real/b.png", "https://x/a.png", "real", "."]
    assert len({keys.key(name) for name in [*others, same[0]]}) == 6
