"""Images behind ``https://`` addresses: fetched ahead of their use, within limits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urljoin

from vqr1_metric.images.find import Found
from vqr1_metric.images.names import NamedBytes, is_url

#: Limits of one image: bytes, seconds for all of it, redirections. Every address on the way has to be https.
MAX_BYTES, SECONDS, REDIRECTIONS = 64 << 20, 60.0, 3
_AT_A_TIME, _AHEAD = 8, 16


class FetchError(OSError):
    """An address that cannot be fetched; the message says why, without the address."""


def fetch(url: str, *, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """What an address holds.

    Raises:
        FetchError: for anything but an answer 200 within the limits.
    """
    try:
        import httpx
    except ImportError:
        raise FetchError("fetching needs httpx: pip install 'vqr1-metric[http]'") from None
    deadline = time.monotonic() + seconds
    try:
        with httpx.Client(timeout=min(20.0, seconds), follow_redirects=False) as client:
            for _ in range(REDIRECTIONS + 1):
                if not url.startswith("https://"):
                    raise FetchError("leads to an address that is not https")
                with client.stream("GET", url) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers["location"])
                        continue
                    if answer.status_code != 200:
                        raise FetchError(f"cannot be fetched (status {answer.status_code})")
                    body = bytearray()
                    for chunk in answer.iter_bytes():
                        body += chunk
                        if len(body) > max_bytes:
                            raise FetchError(f"is more than {max_bytes >> 20} MiB")
                        if time.monotonic() > deadline:
                            raise FetchError(f"did not arrive within {seconds:g} s")
                    return bytes(body)
        raise FetchError(f"leads through more than {REDIRECTIONS} addresses")
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError) as error:
        raise FetchError(f"cannot be fetched ({type(error).__name__}: {error})") from None


def fetch_ahead(found: Iterable[Found]) -> Iterator[tuple[str, str | NamedBytes, str | None]]:
    """Name, what to score (the name, or what an address holds) and what is wrong, one image after the other."""
    waiting: deque[tuple[Found, Future[bytes] | None]] = deque()
    pool = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="vqr1-fetch")
    try:
        for one in found:
            remote = one.problem is None and is_url(one.name)
            waiting.append((one, pool.submit(fetch, one.name) if remote else None))
            while waiting and (waiting[0][1] is None or len(waiting) > _AHEAD):
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(one: Found, future: Future[bytes] | None) -> tuple[str, str | NamedBytes, str | None]:
    if future is None:
        return one.name, one.name, one.problem
    try:
        return one.name, NamedBytes(future.result(), one.name), None
    except FetchError as error:
        return one.name, one.name, str(error)
