"""What every request passes: a bound on their number, no requests from other sites, headers, counting."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
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


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind the gate.
        metrics: where requests are counted.
        requests: scoring requests in progress at a time; further ones get 503.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, requests: int) -> None:
        self._app, self._metrics, self._requests = app, metrics, requests
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self._admit(scope, receive, send_with_headers)
        finally:
            # Unknown paths share one label, or a scanner would fill the memory with them.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if _from_another_site(headers):
            answer = JSONResponse({"detail": "Requests from pages of other sites are refused."}, 403)
            await answer(scope, receive, send)
            return
        if self._active >= self._requests:
            message = f"Busy with {self._requests} requests; try again in a second."
            await JSONResponse({"detail": message}, 503, {"Retry-After": "1"})(scope, receive, send)
            return
        self._active += 1
        self._metrics.active.inc()
        try:
            await self._app(scope, receive, send)
        finally:
            self._active -= 1
            self._metrics.active.dec()


def _from_another_site(headers: Headers) -> bool:
    """Browsers state the page's origin with every POST; other clients do not."""
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
