"""Every call into the connector goes through here: it is timed, counted, and a place where a drill may strike."""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from io import FileIO
from typing import Any

from .faults import RAISED, EngineDead, Violation

SLOW_S = 0.005
SCHEDSTAT = "/proc/thread-self/schedstat"


class Callbacks:
    def __init__(self, rank: int, measure: bool) -> None:
        self.rank = rank
        self.iteration = 0
        self.counts: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """Per callback, without the time in which the thread was ready but another had its core."""
        self.connector_seconds: dict[str, list[float]] = defaultdict(list)
        """The same without what the engine itself did in the callback: see `engines_own`."""
        self.slow: list[tuple[int, str, float]] = []
        """(number, name, seconds) of each callback that took longer than SLOW_S."""
        self.violations: list[Violation] = []
        self.strike: Callable[[int, str], None] | None = None
        """Called before each callback with its number, from 0, and its name."""
        self.number = 0
        self._own = 0.0
        # A file of the thread that opens it, which is the one that calls.
        self._schedstat = _open_schedstat() if measure else None

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """A callback whose exception ends the executor's loop."""
        try:
            return self._timed(name, function, arguments)
        except Exception as error:
            raise EngineDead(self.violation(RAISED, _told(name, error), fatal=True)) from error

    def call_in_forward(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """A callback whose exception fails the requests of the pass."""
        try:
            self._timed(name, function, arguments)
        except Exception as error:
            self.violation(RAISED, _told(name, error))

    def engines_own(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of an object that a callback is shown. What it takes is the engine's, whoever calls it."""

        def timed(*arguments: Any) -> Any:
            waited, begin = self._waited(), time.perf_counter()
            try:
                return function(*arguments)
            finally:
                taken = time.perf_counter() - begin
                self._own += max(0.0, taken - (self._waited() - waited))

        return timed

    def violation(self, kind: str, detail: str, fatal: bool = False) -> Violation:
        violation = Violation(kind, detail, self.rank, self.iteration, fatal)
        self.violations.append(violation)
        return violation

    def dead(self, kind: str, detail: str) -> EngineDead:
        return EngineDead(self.violation(kind, detail, fatal=True))

    def _timed(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self.strike is not None:
            self.strike(self.number, name)
        self.number += 1
        self.counts[name] += 1
        self._own = 0.0
        waited = self._waited()
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            taken = time.perf_counter() - begin
            taken = max(0.0, taken - (self._waited() - waited))
            self.seconds[name].append(taken)
            self.connector_seconds[name].append(max(0.0, taken - self._own))
            if taken > SLOW_S:
                self.slow.append((self.number - 1, name, taken))

    def _waited(self) -> float:
        """Seconds that this thread was ready to run and waited for a core."""
        if self._schedstat is None:
            return 0.0
        self._schedstat.seek(0)
        return int(self._schedstat.read().split()[1]) / 1e9


def _open_schedstat() -> FileIO | None:
    try:
        return FileIO(SCHEDSTAT)
    except OSError:
        return None


def _told(name: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name}: {type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
