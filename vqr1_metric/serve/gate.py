"""What every request passes: whose host and page it is for, how many there may be, headers, counting, errors."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vqr1_metric.serve.metrics import Metrics

_HEADERS = {
    # The page loads nothing from elsewhere and runs no inline script, whatever a file name or a reply holds.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Ask again whether the page is still this one, or an upgraded service would be used with the old page.
    "Cache-Control": "no-cache",
}
#: What is counted for a client that went away before it had its answer.
_GONE = 499
_log = logging.getLogger("vqr1_metric.serve")


def error_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The one shape of errors."""
    return JSONResponse({"error": {"code": status, "message": message}}, status, headers)


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind the gate.
        metrics: where requests are counted.
        requests: requests that are scored at a time. Four times as many may be on their way in, and of those one client
            gets no more than this: slow senders cannot take all places.
        hosts: names that the service answers to, beside addresses of numbers, ``localhost`` and the machine's name. A
            page of another site can make its own name lead here (DNS rebinding), but it cannot have one of these.
        stopping: is the service about to end? Then clients are told to close their connections.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        requests: int,
        hosts: Iterable[str] = (),
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._metrics, self._requests, self._stopping = app, metrics, requests, stopping
        self._hosts = {name.lower() for name in (*hosts, "localhost", socket.gethostname())}
        self._arriving: Counter[str] = Counter()
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, answered = time.perf_counter(), 500, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if self._stopping():
                    headers["Connection"] = "close"
            await send(message)

        # The server leaves out the body of an answer to HEAD itself; it has its own copy of the scope.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._admit(inner, receive, send_with_headers)
        except ClientDisconnect:
            status = _GONE
        except Exception as error:
            _log.error("a request failed", exc_info=error)
            if not answered:
                await error_answer(500, "The service failed; its log says why.")(inner, receive, send_with_headers)
        finally:
            # Unknown paths share one label, or a scanner would fill the memory with them.
            route = getattr(inner.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        problem = self._foreign(headers)
        if problem:
            await error_answer(403, problem)(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("",))[0]
        full = self._arriving.total() >= 4 * self._requests or self._arriving[client] >= self._requests
        if full or self._active >= self._requests:
            message = f"Busy with {self._requests} requests; try again in a second."
            await error_answer(503, message, {"Retry-After": "1"})(scope, receive, send)
            return
        self._arriving[client] += 1
        self._metrics.active.inc()
        arrived = False

        def note_arrival() -> None:
            nonlocal arrived
            if not arrived:
                arrived = True
                self._arriving[client] -= 1
                self._arriving += Counter()  # forget clients that have none
                self._active += 1

        async def receive_noting() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                note_arrival()
            return message

        try:
            await self._app(scope, receive_noting, send)
        finally:
            note_arrival()
            self._active -= 1
            self._metrics.active.dec()

    def _foreign(self, headers: Headers) -> str | None:
        """Why a request may come from a page of another site, or None."""
        host = headers.get("host", "")
        if not self._ours(host):
            return "The Host of the request is not one of this service; start it with --allow-host NAME."
        origin = headers.get("origin")
        # Browsers state the page's origin; other clients do not.
        if origin is not None and (_netloc(origin) or "null") != host.lower():
            return "Requests from pages of other sites are refused."
        return None

    def _ours(self, host: str) -> bool:
        try:
            name = "" if "@" in host else (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # such as "http://["
        return ""
