"""Services on loopback, each a real server in a thread of its own."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from vqr1_metric.scorer import QualityScorer
from vqr1_metric.serve.app import create_app
from vqr1_metric.serve.limits import Limits

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


def encoded(seed: int = 0, size: tuple[int, int] = (60, 48), kind: str = "PNG") -> bytes:
    """A noise picture as a file; ``size`` is width, height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def form(*pictures: bytes) -> list:
    """The argument ``files`` of a request."""
    return [("images", (f"{i}.png", picture)) for i, picture in enumerate(pictures)]


@contextlib.contextmanager
def _serving(scorer: QualityScorer, limits: Limits | None = None, **options) -> Iterator[httpx.Client]:
    config = uvicorn.Config(create_app(scorer, limits, **options), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Serve:
    """``serve(scorer, limits)`` as a context manager that gives a client."""
    return _serving
