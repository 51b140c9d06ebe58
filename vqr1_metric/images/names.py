"""Names of images: written so that no name breaks a line or a terminal, and compared by where the file is."""

from __future__ import annotations

import os
import re
from hashlib import blake2b

#: Controls (line breaks of every kind among them), marks that turn the direction of text, lone surrogates (bytes of a
#: file name that are not UTF-8), and the backslash itself.
_SPECIAL = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LONG = {written: character for character, written in _SHORT.items()}
_WRITTEN = re.compile(r"\\u[0-9a-f]{4}|\\[\\nrt]")


def escape_name(name: str) -> str:
    """A name on one line of visible text: ``\\n``, ``\\r``, ``\\t``, ``\\\\``, and ``\\uXXXX`` for other controls.

    A byte of a file name that is not UTF-8 is ``\\udcXX``, as Python holds it. :func:`unescape_name` gives the name
    back, and ``os.fsencode`` of that its bytes.
    """
    return _SPECIAL.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", name)


def unescape_name(text: str) -> str:
    """The name that :func:`escape_name` wrote."""
    return _WRITTEN.sub(lambda found: _LONG.get(found[0]) or chr(int(found[0][2:], 16)), text)


def printable(text: str) -> str:
    """Text as a terminal may show it: controls escaped as in :func:`escape_name`, backslashes as they are."""
    return _SPECIAL.sub(lambda found: "\\" if found[0] == "\\" else escape_name(found[0]), text)


def is_url(name: str) -> bool:
    """Is it an address rather than a file?"""
    return name.startswith(("https://", "http://"))


class NamedBytes(bytes):
    """The content of an image file with what to call it, for images that are not files here."""

    def __new__(cls, content: bytes, filename: str) -> NamedBytes:
        """Bytes that know their name."""
        self = super().__new__(cls, content)
        self.filename = filename
        return self

    filename: str


class ImageKeys:
    """64-bit keys of images, equal where two names lead to one place: relative or absolute, or through a linked folder.

    A link to a file counts as an image of its own. Among a million images two share a key with a probability of 3e-8.

    Args:
        folder: where relative names start.
    """

    def __init__(self, folder: str | os.PathLike[str] = ".") -> None:
        self._folder = os.path.abspath(folder)
        self._resolved: dict[str, str] = {}

    def place(self, name: str) -> str:
        """The file's absolute path, its folder without links; an address as it is."""
        if is_url(name):
            return name
        parent, file = os.path.split(name)
        if file in ("", os.curdir, os.pardir):
            return os.path.realpath(os.path.join(self._folder, name))
        if parent not in self._resolved:
            if len(self._resolved) >= 10_000:  # folders, not files; but there may be very many of those too
                self._resolved.clear()
            try:
                self._resolved[parent] = os.path.realpath(os.path.join(self._folder, parent))
            except (OSError, ValueError):  # a NUL in a list's line
                self._resolved[parent] = os.path.join(self._folder, parent)
        return os.path.join(self._resolved[parent], file)

    def key(self, name: str) -> int:
        """The key of one image."""
        digest = blake2b(self.place(name).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big")
