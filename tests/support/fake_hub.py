"""A stand-in for the Hugging Face Hub on loopback: one model, and every way in which it is not to be had."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class Hub:
    """What is there, and what it was asked.

    Args:
        models: name -> folder.
        gated: names whose files want the token.
        down: answer everything with this status.
    """

    def __init__(self, models: dict[str, Path], *, gated: tuple[str, ...] = (), down: int = 0) -> None:
        self.models, self.gated, self.down = models, gated, down
        self.asked: list[str] = []

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(path)
        if self.down:
            return self.down, {}, b"out of order"
        if token not in ("", TOKEN):
            message = "Invalid credentials in Authorization header"
            return 401, {"X-Error-Message": message}, json.dumps({"error": message}).encode()
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name not in self.models:
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        files = {file.name: file.read_bytes() for file in sorted(self.models[name].iterdir())}
        if api:
            rest = parts[4:]
            if rest[:1] in (["revision"], ["tree"]) and rest[1] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                return 200, {}, json.dumps(tree).encode()
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "gated": False}).encode()
        if name in self.gated and not token:
            return 401, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted."
        file = parts[-1]
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        tag = hashlib.sha1(files[file]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, files[file]


@contextmanager
def serving_hub(hub: Hub) -> Iterator[str]:
    """Run it; gives its address, for HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body: bool = True) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            status, headers, data = hub.answer(self.path, token)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
