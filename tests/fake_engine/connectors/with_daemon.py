"""The reference connector with a daemon, for drills, and ways to do that wrong.

`server_url` is the daemon's socket; the bytes lie in the directory `state` beside it.
"""

from __future__ import annotations

import socket
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

from .directory_store import DirectoryStore
from .reference_scheduler import ReferenceScheduler
from .reference_worker import LoadJob, ReferenceWorker

DEADLINE_S = 0.015
RETRY_S = 0.05
PATIENT_S = 2.0
"""Threads that hold nobody up may wait."""
FOR_EVER_S = 3600.0


class DaemonStore(DirectoryStore):
    """Asks the daemon, within the deadline or not at all: after one failure a thread knocks until it answers."""

    def __init__(self, path: str, ranks: int, deadline_s: float) -> None:
        super().__init__(f"dir:{Path(path).parent}/state", ranks)
        self._socket_path = path
        self._deadline_s = deadline_s
        self._there: set[str] = set()
        self._pipe = self._connect()
        if self._pipe is None:
            self.knock()

    def knock(self) -> None:
        threading.Thread(target=self._knock, daemon=True).start()

    def _knock(self) -> None:
        """Until a daemon answers: one that stands still takes connections too."""
        while True:
            pipe = self._connect()
            if pipe is not None and self._exchange(pipe, "has", [], PATIENT_S) is not None:
                self._pipe = pipe
                return
            time.sleep(RETRY_S)

    def _connect(self) -> connection.Connection | None:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(self._socket_path)
        except OSError:
            end.close()
            return None
        return connection.Connection(end.detach())

    def look_up(self, keys: list[str], groups: int) -> None:
        """One question per query."""
        names = [f"{key}.{group}.{rank}" for key in keys for group in range(groups) for rank in range(self.ranks)]
        there = self.ask("has", names) or [False] * len(names)
        self._there = {name for name, found in zip(names, there, strict=True) if found}

    def has(self, key: str, group: int) -> bool:
        return all(f"{key}.{group}.{rank}" in self._there for rank in range(self.ranks))

    def ask(self, what: str, names: list[str]) -> Any:
        """None when the daemon is away or slow."""
        pipe = self._pipe
        if pipe is None:
            return None
        answer = self._exchange(pipe, what, names, self._deadline_s)
        if answer is None:
            # An answer that comes late would be taken for that to the next question.
            self._pipe = None
            self.knock()
        return answer

    @staticmethod
    def _exchange(pipe: connection.Connection, what: str, names: list[str], seconds: float) -> Any:
        try:
            pipe.send((what, names))
            if pipe.poll(seconds):
                return pipe.recv()
        except (OSError, EOFError):
            pass
        pipe.close()
        return None

    def put(self, key: str, group: int, rank: int, data: bytes, priority: int) -> None:
        name = f"{key}.{group}.{rank}"
        if (self.path / name).exists():
            return
        (self.path / f"part.{name}").write_bytes(data)
        self.ask("commit", [name])


class Scheduler(ReferenceScheduler):
    DEADLINE_S = DEADLINE_S

    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return DaemonStore(url, ranks, self.DEADLINE_S)

    def take_lease(self, keys: list[str]) -> str:
        """Nothing is ever evicted: what is there stays, with the daemon or without it."""
        return ""


class Worker(ReferenceWorker):
    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return DaemonStore(url, ranks, PATIENT_S)


class HoldingWorker(Worker):
    """Does not let go of what it saves before the daemon has taken it."""

    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return DaemonStore(url, ranks, FOR_EVER_S)


class PatientScheduler(Scheduler):
    """Waits for the daemon for as long as it takes."""

    DEADLINE_S = PATIENT_S


class NoBreakerStore(DaemonStore):
    def ask(self, what: str, names: list[str]) -> Any:
        answer = super().ask(what, names)
        self._pipe = self._pipe or self._connect()
        return answer

    def knock(self) -> None:
        return None


class NoBreakerScheduler(Scheduler):
    """Waits for the deadline each time."""

    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return NoBreakerStore(url, ranks, self.DEADLINE_S)


class RaisingScheduler(Scheduler):
    """Passes the loss of the daemon on to the engine."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if isinstance(self.store, DaemonStore) and self.store.ask("has", []) is None:
            raise ConnectionError("the daemon is away")
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


class DependentWorker(Worker):
    """Needs the daemon to keep its promises, and says that a load is over when it failed."""

    def _load(self, job: LoadJob) -> None:
        assert isinstance(self.store, DaemonStore)
        time.sleep(0.02)
        if self.store.ask("has", []) is not None:
            super()._load(job)
