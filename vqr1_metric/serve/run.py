"""The service as a process: its socket before the model, its connections within limits of time."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for the head of a request to arrive; a connection that has begun one and stops there is closed.
HEAD_SECONDS = 10.0


class TimedProtocol(H11Protocol):
    """Closes connections whose request does not come to the end of its head."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head."""
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Go on with a head, or have it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is there
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, which nobody can connect to before :func:`serve`.

    Raises:
        OSError: if the address is not free, or not of this machine.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def serve(make_app: Callable[[Callable[[], bool]], FastAPI], bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; what was accepted by then is finished.

    Args:
        make_app: gives the application for a function that says whether the service is about to end.
        bound: from :func:`bind`.
    """
    bound.listen(1024)  # who comes before the application is ready waits
    server: uvicorn.Server | None = None
    app = make_app(lambda: server is not None and server.should_exit)
    config = uvicorn.Config(
        app, http=TimedProtocol, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.run(sockets=[bound])


def is_loopback(host: str) -> bool:
    """Does only this machine reach it?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
