"""Requests are fetched on a thread, served as tasks of one event loop, and answered piece by piece."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Protocol

from .requests import Requests

_log = logging.getLogger(__name__)

# The fetching thread looks whether it is to end.
_LOOK_SECONDS = 0.2


class Worker(Protocol):
    """`kvbm_connector._native.Worker`."""

    @property
    def running(self) -> int: ...
    def next(self, seconds: float) -> tuple[int, dict[str, Any] | None] | None: ...
    def started(self, number: int, device_tokens: int, host_tokens: int) -> bool: ...
    def tokens(self, number: int, ids: list[int]) -> bool: ...
    def finished(self, number: int, reason: str, prompt_tokens: int, completion_tokens: int) -> bool: ...
    def invalid(self, number: int, why: str) -> bool: ...
    def failed(self, number: int, why: str) -> bool: ...
    def drain(self) -> None: ...


class Service:
    def __init__(self, worker: Worker, llm: Any, requests: Requests) -> None:
        self._worker = worker
        self._llm = llm
        self._requests = requests
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopped = threading.Event()

    async def run(self, stop: asyncio.Event, drain_seconds: float) -> None:
        """Until `stop`, and then until the answers under way have ended, or so many seconds."""
        loop = asyncio.get_running_loop()
        fetching = threading.Thread(target=self._fetch, args=(loop,), name="kvbm-fetch", daemon=True)
        fetching.start()
        await stop.wait()
        self._worker.drain()
        deadline = loop.time() + drain_seconds
        while self._worker.running > 0 and loop.time() < deadline:
            await asyncio.sleep(0.05)
        self._stopped.set()
        await asyncio.to_thread(fetching.join)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _fetch(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopped.is_set():
            event = self._worker.next(_LOOK_SECONDS)
            if event is not None:
                loop.call_soon_threadsafe(self._take, *event)

    def _take(self, number: int, request: dict[str, Any] | None) -> None:
        if request is None:
            task = self._tasks.get(number)
            if task is not None:
                task.cancel()
            return
        task = asyncio.get_running_loop().create_task(self._serve(number, request))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _serve(self, number: int, request: dict[str, Any]) -> None:
        try:
            # Loading of images waits for others.
            arguments = await asyncio.to_thread(self._requests.arguments, request)
            result = self._llm.generate_async(**arguments)
        except ValueError as error:
            self._worker.invalid(number, str(error))
            return
        except Exception as error:
            _log.exception("request %s could not be begun", request["request_id"])
            self._worker.failed(number, f"{type(error).__name__}: {error}")
            return
        try:
            await self._answer(number, request, result)
        except asyncio.CancelledError:
            result.abort()
            raise
        except Exception as error:
            _log.exception("request %s failed", request["request_id"])
            self._worker.failed(number, f"{type(error).__name__}: {error}")

    async def _answer(self, number: int, request: dict[str, Any], result: Any) -> None:
        sent, reason, is_started = 0, None, False
        async for output in result:
            choice = output.outputs[0]
            if not is_started:
                is_started = True
                # The connector's tokens are not told apart from the engine's own here.
                self._worker.started(number, int(getattr(output, "cached_tokens", 0) or 0), 0)
            ids = list(choice.token_ids)
            if len(ids) > sent and not self._worker.tokens(number, ids[sent:]):
                result.abort()
                return
            sent, reason = len(ids), choice.finish_reason
        told = {"stop": "stop", "length": "length"}.get(str(reason), "cancelled")
        completion = len(request["generated"]) + sent
        self._worker.finished(number, told, len(request["prompt"]), completion)
