"""Requests to an OpenAI-compatible chat-completions server: bounded, retried, checked, and without leaking the key."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from vqr1_metric.backends.base import ImageFailed, ModelError
from vqr1_metric.redaction import read_key, redact

#: A server may state sums a little above one by rounding.
_SUM_TOLERANCE = 1e-3
_MAX_BACKOFF = 60.0
#: Seconds in which a server that is well answers what models it has.
_HEALTH_SECONDS = 10.0
#: The longest answer that is read: 7 tokens with 20 alternatives each take some kB.
_MAX_BYTES = 16 << 20
#: Statuses that say the address, the key or the model is wrong, not the request.
_ABOUT_ACCESS = (401, 403, 404, 405)

_Answer = TypeVar("_Answer")


class ServerError(ModelError):
    """A server that cannot be reached or used; the message says what it answered and what to do."""


class RequestFailed(ServerError, ImageFailed):
    """All tries of one request failed, while the server itself is well."""


class RequestRefused(ServerError):
    """The server understood a request and refuses it (4xx): asking again is of no use."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ImageRefused(RequestRefused, ImageFailed):
    """It refuses what was asked about this image; others may be fine."""


class Malformed(Exception):
    """An answer that is none; worth asking again."""


@dataclass(frozen=True)
class Connection:
    """How to talk to a server. Holds the name of the key's variable, never the key.

    Args:
        base_url: up to and including ``/v1``, without credentials.
        key_variable: environment variable with the API key; unset means none is sent.
        concurrency: requests at a time.
        timeout: seconds for one request, from the first byte sent to the last received.
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

    def headers(self) -> dict[str, str]:
        """With the key, read when it is needed."""
        try:
            key = read_key(self.key_variable)
        except ValueError as error:
            raise ServerError(str(error)) from None
        return {"Authorization": f"Bearer {key}"} if key else {}

    def redact(self, text: str) -> str:
        """Text without the key, short enough for an error message."""
        return " ".join(redact(text, self.key_variable).split())[:300]


@dataclass(frozen=True)
class Choice:
    """One reply.

    Args:
        text: what it says.
        steps: if they were stated, each token with the probabilities of the likely ones there.
        alternatives: the smallest number of likely tokens that a step states.
        model: the name that the server answers under, if it states one.
    """

    text: str
    steps: list[tuple[str, dict[str, float]]] | None
    alternatives: int
    model: str | None


class ChatClient:
    """One session with a server, inside one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._slots = asyncio.Semaphore(connection.concurrency)
        self._http = httpx.AsyncClient(
            base_url=connection.base_url.rstrip("/") + "/",
            timeout=connection.timeout,
            limits=httpx.Limits(max_connections=connection.concurrency + 1),
            follow_redirects=False,  # the key is for this server
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that are served."""
        return await self._ask("GET", "models", None, lambda body: [str(entry["id"]) for entry in body["data"]])

    async def complete(
        self, request: Mapping[str, Any], check: Callable[[Choice], object] = lambda choice: None
    ) -> Choice:
        """One reply to a chat; ``check`` raises :class:`Malformed` for one that is worth asking for again."""

        def read(body: Any) -> Choice:
            choice = _one_choice(body)
            check(choice)
            return choice

        return await self._ask("POST", "chat/completions", request, read)

    async def _ask(
        self, method: str, path: str, request: Mapping[str, Any] | None, read: Callable[[Any], _Answer]
    ) -> _Answer:
        connection = self._connection
        problem = ""
        for attempt in range(1, connection.tries + 1):
            wait = min(_MAX_BACKOFF, connection.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            headers = connection.headers()
            try:
                async with self._slots, asyncio.timeout(connection.timeout):
                    response, body = await self._exchange(method, path, request, headers)
                if response.status_code == 200:
                    return read(json.loads(body))
                if response.status_code != 429 and response.status_code < 500:
                    raise self._refusal(response, body)
                problem = f"it answered {response.status_code} {_message(body)}"
                wait = _retry_after(response) or wait
            except ServerError:
                raise
            except (TimeoutError, httpx.TimeoutException):
                problem = f"it did not answer within {connection.timeout:g} s"
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
                problem = f"the connection failed ({type(error).__name__}: {error})"
            # Whatever is wrong with an answer (not JSON, too deep, other types, other keys) is the server's.
            except Exception as error:
                problem = f"it sent an answer that cannot be read ({type(error).__name__}: {error})"
            if attempt < connection.tries:
                await asyncio.sleep(wait)
        message = f"{connection.base_url}: asked {connection.tries} times, and at last {connection.redact(problem)}."
        if await self._well():
            raise RequestFailed(message)
        raise ServerError(f"{message} Try again when the server is well.")

    async def _exchange(
        self, method: str, path: str, request: Mapping[str, Any] | None, headers: dict[str, str]
    ) -> tuple[httpx.Response, bytes]:
        body = bytearray()
        async with self._http.stream(method, path, json=request, headers=headers) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_BYTES:
                    raise Malformed(f"an answer of more than {_MAX_BYTES >> 20} MiB")
        return response, bytes(body)

    async def _well(self) -> bool:
        """Does the server answer at all?"""
        try:
            async with asyncio.timeout(min(_HEALTH_SECONDS, self._connection.timeout)):
                response, _ = await self._exchange("GET", "models", None, self._connection.headers())
            return response.status_code < 500
        except Exception:
            return False

    def _refusal(self, response: httpx.Response, body: bytes) -> RequestRefused:
        hints = {
            401: f"; set the environment variable {self._connection.key_variable} to its API key",
            403: f"; does the key in {self._connection.key_variable} allow this?",
            404: "; the address should end in /v1, and the model must be one that it serves",
        }
        status = response.status_code
        said = self._connection.redact(_message(body))
        message = f"{self._connection.base_url} refused a request with {status} {said}{hints.get(status, '')}"
        return (RequestRefused if status in _ABOUT_ACCESS else ImageRefused)(message, status)


def _one_choice(body: Any) -> Choice:
    choices = body["choices"]
    if len(choices) != 1:
        raise Malformed(f"{len(choices)} replies to a request for one")
    content = choices[0]["message"]["content"] or ""
    if not isinstance(content, str):
        raise Malformed("its content is no text")
    stated = (choices[0].get("logprobs") or {}).get("content")
    steps = None if stated is None else [_step(entry) for entry in stated]
    fewest = min((len(entry["top_logprobs"]) for entry in stated or ()), default=0)
    return Choice(content, steps, fewest, None if body.get("model") is None else str(body["model"]))


def _step(entry: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """A token and the probabilities of the likely ones in its place."""
    probabilities: dict[str, float] = {}
    for likely in [*entry["top_logprobs"], entry]:
        logarithm = float(likely["logprob"])
        if math.isnan(logarithm) or logarithm > _SUM_TOLERANCE:
            raise Malformed(f"a log-probability of {logarithm}")
        # The token that was taken is listed twice. Two tokens may read the same (pieces of one character).
        probabilities[_text(likely)] = max(math.exp(logarithm), probabilities.get(_text(likely), 0.0))
    if sum(probabilities.values()) > 1 + _SUM_TOLERANCE:
        raise Malformed(f"probabilities that add up to {sum(probabilities.values()):.3f}")
    return _text(entry), probabilities


def _text(entry: Mapping[str, Any]) -> str:
    raw = entry.get("bytes")
    return bytes(raw).decode("utf-8", "replace") if raw else str(entry["token"])


def _message(body: bytes) -> str:
    """What an answer says of an error, in OpenAI's form or any other."""
    try:
        said = json.loads(body)
        said = said.get("error", said)
        return str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError, RecursionError):
        return body[:300].decode("utf-8", "replace")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for, at most a minute."""
    stated = response.headers.get("retry-after", "")
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(_MAX_BACKOFF, max(0.0, seconds)) if math.isfinite(seconds) else None
