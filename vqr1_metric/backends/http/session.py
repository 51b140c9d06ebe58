"""An event loop in a thread of its own with one client, for callers of any thread, inside an event loop or not."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from vqr1_metric.backends.http.client import ChatClient, Connection

_Result = TypeVar("_Result")


class Session:
    """Runs asynchronous work with one :class:`ChatClient`, whose connections are kept from call to call."""

    def __init__(self, connection: Connection) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vqr1-http", daemon=True)
        self._thread.start()
        self._tasks: set[asyncio.Task[Any]] = set()

        async def connect() -> ChatClient:
            return ChatClient(connection)

        self._client = asyncio.run_coroutine_threadsafe(connect(), self._loop).result()

    def run(self, work: Callable[[ChatClient], Awaitable[_Result]]) -> _Result:
        """Run work to its end; Ctrl-C ends it at once."""

        async def tracked() -> _Result:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                return await work(self._client)
            finally:
                self._tasks.discard(task)

        future = asyncio.run_coroutine_threadsafe(tracked(), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def cancel(self) -> None:
        """End all work that is running; its callers get ``concurrent.futures.CancelledError``."""

        def end() -> None:
            for task in list(self._tasks):
                task.cancel()

        self._loop.call_soon_threadsafe(end)

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self.process != os.getpid() or self._loop.is_closed():  # a forked process has not got the thread
            return
        self.cancel()
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def all_of(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """All results, in order; the first error ends the rest and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
