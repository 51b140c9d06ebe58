"""API keys: read from the environment where they are needed, and taken out of every text that leaves the program."""

from __future__ import annotations

import base64
import json
import os
import re
from urllib.parse import quote, quote_plus

#: Variables that hold keys, for clients of a server and for the service of this package.
SERVER_KEY, SERVICE_KEY = "VQR1_SERVER_KEY", "VQR1_API_KEY"
_HIDDEN = "***"
#: User name and password in an address, and credentials as a header states them.
_USERINFO = re.compile(r"(?<=://)[^\s/]*@")
_HEADER = re.compile(r"(?i)\b(bearer|authorization:\s*basic)(\s+|%20|\+)(?!\*\*\*)[^\s'\"<>,;]+")
#: Pieces of a key of several lines are hidden too, unless they are so short that they occur everywhere.
_PIECE = 4


def read_key(variable: str) -> str:
    """The key in an environment variable, without the blanks and line ends around it; empty if there is none.

    Raises:
        ValueError: if it holds what no header can; the message does not repeat it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"Expected the key in {variable} to be printable ASCII without blanks, as it is sent in a header; it holds "
            "other characters."
        )
    return key


def redact(text: str, *variables: str) -> str:
    """The text without keys, in whatever form they stand there, and without credentials in addresses and headers.

    Args:
        text: any message.
        variables: environment variables that hold keys, beside those of this package.
    """
    for variable in (SERVER_KEY, SERVICE_KEY, *variables):
        for form in _forms(os.environ.get(variable, "")):
            text = text.replace(form, _HIDDEN)
    return _HEADER.sub(rf"\1 {_HIDDEN}", _USERINFO.sub(f"{_HIDDEN}@", text))


def _forms(key: str) -> list[str]:
    """How a key may stand in a message, the longest first."""
    if not key.strip():
        return []
    texts = {key, key.strip(), " ".join(key.split()), *(piece for piece in key.split() if len(piece) >= _PIECE)}
    forms = set(texts)
    for text in texts:
        data = text.encode("utf-8", "surrogateescape")
        forms |= {repr(text)[1:-1], ascii(text)[1:-1], json.dumps(text)[1:-1], repr(data)[2:-1]}
        forms |= {
            quote(data),
            quote(data, safe=""),
            quote_plus(data),
            base64.b64encode(data).decode(),
            data.decode("latin-1"),
        }
        forms |= {data.decode("utf-8", "replace"), data.hex()}
    return sorted((form for form in forms if form.strip()), key=len, reverse=True)
