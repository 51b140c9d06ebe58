"""Requests to an OpenAI-compatible chat-completions server: bounded, retried, checked, and without leaking the key."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from vqr1_metric.backends.base import ModelError

#: A server may state sums a little above one by rounding.
_SUM_TOLERANCE = 1e-3
_MAX_BACKOFF = 60.0


class ServerError(ModelError):
    """A server that cannot be reached or used; the message says what it answered and what to do."""


class RequestRefused(ServerError):
    """The server understood a request and refuses it (4xx): asking again is of no use."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Malformed(Exception):
    """An answer that is none; worth asking again."""


@dataclass(frozen=True)
class Connection:
    """How to talk to a server. Holds the name of the key's variable, never the key.

    Args:
        base_url: up to and including ``/v1``.
        key_variable: environment variable with the API key; unset means none is sent.
        concurrency: requests at a time.
        timeout: seconds for one request.
        tries: attempts at a request that fails in a way that may pass.
        backoff: seconds before the second try, doubled for each further one, within half of it at random; a
            ``Retry-After`` of the server comes before it.
    """

    base_url: str
    key_variable: str
    concurrency: int
    timeout: float
    tries: int
    backoff: float

    def key(self) -> str:
        """The key, read when it is needed."""
        return os.environ.get(self.key_variable, "")

    def redact(self, text: str) -> str:
        """Text without the key, short enough for an error message."""
        key = self.key()
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


@dataclass(frozen=True)
class Choice:
    """One reply: its text, and, if they were stated, each token with the probabilities of the likely ones there."""

    text: str
    steps: list[tuple[str, dict[str, float]]] | None


class ChatClient:
    """One session with a server, inside one event loop.

    Use as ``async with ChatClient(connection) as client``.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._slots = asyncio.Semaphore(connection.concurrency)
        key = connection.key()
        self._http = httpx.AsyncClient(
            base_url=connection.base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=connection.timeout,
            limits=httpx.Limits(max_connections=connection.concurrency),
            follow_redirects=False,  # the key is for this server
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that are served."""
        return await self._ask("GET", "models", None, lambda body: [str(entry["id"]) for entry in body["data"]])

    async def complete(self, request: Mapping[str, Any]) -> Choice:
        """One reply to a chat."""
        return await self._ask("POST", "chat/completions", request, _one_choice)

    async def _ask(self, method: str, path: str, request: Mapping[str, Any] | None, read):
        connection = self._connection
        for attempt in range(1, connection.tries + 1):
            wait = min(_MAX_BACKOFF, connection.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            try:
                async with self._slots:
                    response = await self._http.request(method, path, json=request)
                if response.status_code == 200:
                    try:
                        return read(response.json())
                    except (_Malformed, ValueError, KeyError, TypeError, IndexError) as error:
                        problem = f"it sent an answer that cannot be read ({type(error).__name__}: {error})"
                elif response.status_code == 429 or response.status_code >= 500:
                    problem = f"it answered {response.status_code} {_message(response)}"
                    wait = _retry_after(response) or wait
                else:
                    raise self._refusal(response)
            except httpx.TimeoutException:
                problem = f"it did not answer within {connection.timeout:g} s"
            except httpx.TransportError as error:
                problem = f"the connection failed ({type(error).__name__}: {error})"
            if attempt < connection.tries:
                await asyncio.sleep(wait)
        raise ServerError(
            f"{connection.base_url}: asked {connection.tries} times, and at last "
            + connection.redact(problem)
            + ". Try again when the server is well."
        )

    def _refusal(self, response: httpx.Response) -> RequestRefused:
        hints = {
            401: f"; set the environment variable {self._connection.key_variable} to its API key",
            403: f"; does the key in {self._connection.key_variable} allow this?",
            404: "; the address should end in /v1, and the model must be one that it serves",
        }
        said = self._connection.redact(_message(response))
        status = response.status_code
        return RequestRefused(
            f"{self._connection.base_url} refused a request with {status} {said}{hints.get(status, '')}", status
        )


def _one_choice(body: Any) -> Choice:
    choices = body["choices"]
    if len(choices) != 1:
        raise _Malformed(f"{len(choices)} replies to a request for one")
    content = choices[0]["message"]["content"] or ""
    if not isinstance(content, str):
        raise _Malformed("its content is no text")
    stated = (choices[0].get("logprobs") or {}).get("content")
    return Choice(content, None if stated is None else [_step(entry) for entry in stated])


def _step(entry: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """A token and the probabilities of the likely ones in its place."""
    probabilities: dict[str, float] = {}
    for likely in [*entry["top_logprobs"], entry]:
        logarithm = float(likely["logprob"])
        if math.isnan(logarithm) or logarithm > _SUM_TOLERANCE:
            raise _Malformed(f"a log-probability of {logarithm}")
        # The token that was taken is listed twice. Two tokens may read the same (pieces of one character).
        probabilities[_text(likely)] = max(math.exp(logarithm), probabilities.get(_text(likely), 0.0))
    if sum(probabilities.values()) > 1 + _SUM_TOLERANCE:
        raise _Malformed(f"probabilities that add up to {sum(probabilities.values()):.3f}")
    return _text(entry), probabilities


def _text(entry: Mapping[str, Any]) -> str:
    raw = entry.get("bytes")
    return bytes(raw).decode("utf-8", "replace") if raw else str(entry["token"])


def _message(response: httpx.Response) -> str:
    try:
        body = response.json()
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        return response.text[:300]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for, at most a minute."""
    stated = response.headers.get("retry-after", "")
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(_MAX_BACKOFF, max(0.0, seconds)) if math.isfinite(seconds) else None
