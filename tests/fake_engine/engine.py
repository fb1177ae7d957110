"""An engine as a scenario handles it: rank processes that are forked, driven iteration by iteration, and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from . import rank as rank_process
from .config import EngineConfig
from .executor import Cancel, CancelWhenParked, DropUnused, Operation, Submit
from .faults import EXPECTATION, RAISED, TOO_SLOW, Violation
from .parentage import die_with_parent
from .rank import Audit, Leave, Reply, Status, Step
from .request import RequestSpec

HUNG_S = 60.0
"""A rank that says nothing for so long hangs in a callback."""


class EngineGone(Exception):
    """The engine ended, or was never there."""


class Engine:
    def __init__(self, config: EngineConfig, strike: rank_process.Strike | None = None, strike_rank: int = 0) -> None:
        self.config = config
        self.violations: list[Violation] = []
        self.statuses: dict[int, Status] = {}
        self.dead = False
        self.refused: str | None = None
        self.iterations = 0
        self.callbacks = [0] * config.ranks
        """So far, of each rank."""
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}
        self.connector_seconds: dict[str, list[float]] = {}
        """Without what the engine itself does in a callback."""
        self.slow: list[tuple[int, int, str, float]] = []
        """(rank, number, name, seconds) of callbacks that took long."""
        self._operations: list[Operation] = []
        self._next_id = 1
        try:
            self._start(strike, strike_rank)
        except EngineGone:
            self.give_up()

    def _start(self, strike: rank_process.Strike | None, strike_rank: int) -> None:
        context = multiprocessing.get_context("fork")
        stars = [context.Pipe() for _ in range(self.config.ranks - 1)]
        controls = [context.Pipe() for _ in range(self.config.ranks)]
        self._controls: list[Connection] = [mine for mine, _ in controls]
        self.processes: list[Any] = []
        ends = [end for pair in stars + controls for end in pair]
        for number in range(self.config.ranks):
            pipes = [pair[0] for pair in stars] if number == 0 else [stars[number - 1][1]]
            kept = pipes + [controls[number][1]]
            arguments = (self.config, number, pipes, controls[number][1], strike if number == strike_rank else None)
            process = context.Process(target=_in_child, args=(os.getpid(), ends, kept, arguments), daemon=True)
            process.start()
            self.processes.append(process)
        for end in ends:
            if end not in self._controls:
                end.close()
        self._collect()

    # Requests.

    def submit(self, prompt: Sequence[int], max_new_tokens: int = 4, **more: Any) -> int:
        """A client sends a request; the engine sees it at its next iteration."""
        request_id = self._next_id
        self._next_id += 1
        spec = RequestSpec(request_id, tuple(prompt), max_new_tokens, **more)
        self._operations.append(Submit(spec))
        return request_id

    def cancel(self, request_id: int) -> None:
        self._operations.append(Cancel(request_id))

    def cancel_when_parked(self, request_id: int) -> None:
        """Cancels in the iteration in which the request's load is started."""
        self._operations.append(CancelWhenParked(request_id))

    def forget_cache(self) -> None:
        """The engine forgets the blocks that it keeps for reuse."""
        self._operations.append(DropUnused())

    def status(self, request_id: int) -> Status:
        return self.statuses[request_id]

    # Iterations.

    def step(self, count: int = 1) -> bool:
        """So many iterations. False where there was nothing to do."""
        if self.dead:
            raise EngineGone
        operations, self._operations = self._operations, []
        replies = self._ask(Step(operations, count))
        self.iterations += count
        return replies[0].ran

    def run(self, *request_ids: int) -> None:
        """Until these requests, or all, are over for their clients."""
        self.run_until(lambda: all(self.status(id_).over for id_ in request_ids or self.statuses))

    def run_until(self, reached: Callable[[], bool]) -> bool:
        """Until a condition holds. A scenario that never comes there has failed."""
        seconds = self.config.patience_s
        deadline = time.monotonic() + seconds
        ran = True
        while ran or self._operations:
            ran = self.step()
            if self._reached(reached):
                return True
            if time.monotonic() > deadline:
                states = {id_: status.state for id_, status in self.statuses.items() if not status.over}
                self._add(EXPECTATION, f"requests did not get on for {seconds} s: {states}")
                return False
        self._add(EXPECTATION, "the engine is idle and what was waited for has not come")
        return False

    @staticmethod
    def _reached(condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except KeyError:
            # A request that the engine has not seen yet.
            return False

    def idle(self, seconds: float) -> None:
        """No iteration, as in an engine without requests."""
        time.sleep(seconds)

    def audit(self) -> None:
        """Looks at every byte of the pool."""
        self._ask(Audit())

    # The end.

    def leave(self) -> None:
        """An orderly end; timings and counts are there afterwards."""
        if not self.dead:
            self.audit()
        if not self.dead:
            replies = self._ask(Leave())
            self.counts = replies[0].counts
            for rank, reply in enumerate(replies):
                self.slow += [(rank, *entry) for entry in reply.slow]
                for name, values in reply.seconds.items():
                    self.seconds.setdefault(name, []).extend(values)
                for name, values in reply.connector_seconds.items():
                    self.connector_seconds.setdefault(name, []).extend(values)
        self.give_up()

    def kill(self) -> None:
        """Every rank dies at once, by SIGKILL."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        self.give_up()

    def give_up(self) -> None:
        """Ends the processes."""
        self.dead = True
        for control in self._controls:
            control.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, command: object) -> list[Reply]:
        for control in self._controls:
            try:
                control.send(command)
            except OSError:
                pass
        return self._collect()

    def _collect(self) -> list[Reply]:
        replies = []
        for number, control in enumerate(self._controls):
            try:
                if not control.poll(5.0 if self.dead else HUNG_S):
                    if not self.dead:
                        self._add(TOO_SLOW, f"rank {number} said nothing for {HUNG_S} s", number)
                    reply = Reply(dead=True)
                else:
                    reply = control.recv()
            except (EOFError, OSError):
                reply = Reply(dead=True)
                if not self.dead:
                    self._add(RAISED, f"the process of rank {number} ended", number)
            self.violations += reply.violations
            self.refused = self.refused or reply.refused
            self.dead = self.dead or reply.dead
            replies.append(reply)
        if replies[0].statuses:
            self.statuses = replies[0].statuses
        self.callbacks = [max(pair) for pair in zip(self.callbacks, (r.callbacks for r in replies), strict=True)]
        if self.dead:
            for process in self.processes:
                if process.is_alive():
                    process.kill()
            raise EngineGone
        return replies

    def _add(self, kind: str, detail: str, rank: int = 0) -> None:
        self.violations.append(Violation(kind, detail, rank, self.iterations))


def _in_child(parent: int, ends: list[Connection], kept: list[Connection], arguments: tuple[Any, ...]) -> None:
    """A child holds its own ends only, so that the death of a peer is an end of file."""
    die_with_parent(parent)
    for end in ends:
        if end not in kept:
            end.close()
    rank_process.main(*arguments)
