"""Addresses: fetched only over https, within limits, each failure a reason; no network is used."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from vqr1_metric.images import urls
from vqr1_metric.images.find import Found
from vqr1_metric.images.urls import FetchError, fetch, fetch_ahead


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``web(handler)``: what answers every request of httpx in this test."""

    def answer_with(handler: Callable[[httpx.Request], httpx.Response]) -> None:
        plain = httpx.Client
        transport = httpx.MockTransport(handler)
        monkeypatch.setattr(httpx, "Client", lambda **options: plain(transport=transport, **options))

    return answer_with


def test_fetched(web):
    web(lambda request: httpx.Response(200, content=b"image of " + request.url.path.encode()))
    assert fetch("https://x/a.png") == b"image of /a.png"


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (lambda r: httpx.Response(404), r"status 404"),
        (lambda r: httpx.Response(302, headers={"location": "http://x/b.png"}), "not https"),
        (lambda r: httpx.Response(302, headers={"location": "file:///etc/passwd"}), "not https"),
        (lambda r: httpx.Response(302, headers={"location": "/again"}), "more than 3 addresses"),
        (lambda r: httpx.Response(200, content=bytes(100)), "is more than 0 MiB"),
        (lambda r: (_ for _ in ()).throw(httpx.ConnectError("refused")), r"cannot be fetched \(ConnectError"),
    ],
)
def test_what_goes_wrong_is_a_reason(web, handler, reason: str):
    web(handler)
    with pytest.raises(FetchError, match=reason):
        fetch("https://x/a.png", max_bytes=50)


def test_a_deadline_for_the_whole(web, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1000))
    monkeypatch.setattr(urls.time, "monotonic", lambda: next(clock))
    web(lambda request: httpx.Response(200, content=(b"x" for _ in range(100))))
    with pytest.raises(FetchError, match="did not arrive within 5 s"):
        fetch("https://x/a.png", seconds=5)


def test_in_order_with_problems_and_files(web, tmp_path: Path):
    web(lambda request: httpx.Response(200 if "good" in request.url.path else 500, content=b"data"))
    found = [Found("a.png"), Found("https://x/good.png"), Found("b", "is a problem"), Found("https://x/bad.png")]
    got = list(fetch_ahead(found))
    assert [name for name, _, _ in got] == [one.name for one in found]
    assert got[0][1] == "a.png" and got[1][1] == b"data" and got[1][1].filename == "https://x/good.png"
    assert [problem for _, _, problem in got] == [None, None, "is a problem", "cannot be fetched (status 500)"]
