"""One drill: work, a fault at callback N, more work, the daemon runs again, and caching has to resume."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from ..engine import Engine, EngineGone
from ..faults import RAISED, TOO_SLOW, Violation
from ..runner import Outcome
from ..scenarios import Context, Options
from .daemon import SLOW_CALL_S, Daemon

TRUSTED_AFTER_S = 10.0
"""After so long a connector may wait for one deadline again."""


@dataclass(frozen=True)
class Plan:
    options: Options
    daemon_command: str
    fault: str | None
    """None: nothing happens, the callbacks are counted."""
    number: int = 0
    rank: int = 0
    seed: int = 0
    deadline_ms: float = 20.0
    slack_ms: float = 10.0
    waits: int = 1
    """Callbacks that may wait for the deadline before the connector stops asking."""

    @property
    def name(self) -> str:
        return f"{self.fault or 'nothing'} at callback {self.number} of rank {self.rank}"

    def run(self) -> Outcome:
        return run(self)


class Striker:
    """In the rank's process: asks the conductor for the fault when the callback's turn has come, and waits for it."""

    def __init__(self, number: int, pipe: Connection) -> None:
        self._number = number
        self._pipe = pipe

    def __call__(self, number: int, name: str) -> None:
        if number == self._number:
            self._pipe.send(name)
            self._pipe.recv()


def run(plan: Plan) -> Outcome:
    begin = time.monotonic()
    ctx = Context(plan.options, "drill", plan.seed)
    daemon = Daemon(plan.daemon_command, ctx.directory)
    url = (plan.options.server_url or "").format(socket=daemon.socket, state=daemon.state)
    ctx.options = dataclasses.replace(plan.options, server_url=url)
    mine, theirs = multiprocessing.Pipe()
    struck = threading.Event()
    if plan.fault is not None:
        ctx.strike, ctx.strike_rank = Striker(plan.number, theirs), plan.rank
        threading.Thread(target=_answer, args=(mine, daemon, plan.fault, struck), daemon=True).start()
    callbacks, healed_at = [0] * plan.options.ranks, begin
    violations: list[Violation] = []
    try:
        daemon.start()
        engine = ctx.engine(pages=16, layers=1)
        _work(ctx, engine)
        callbacks, healed_at = list(engine.callbacks), time.monotonic()
        daemon.heal()
        # Whatever was kept or lost: something new is found again.
        ctx.warm(engine, ctx.tokens(50))
    except EngineGone:
        pass
    except RuntimeError as error:
        ctx.violations.append(Violation(RAISED, f"drill: {error}", 0, 0))
    violations = ctx.finish_engines()
    daemon.close()
    ctx.remove_directory()
    slow = [entry for engine in ctx.engines for entry in engine.slow]
    violations += _stalls(plan, slow, callbacks, healed_at - begin)
    taken = time.monotonic() - begin
    return Outcome(plan.name, plan.seed, violations, callbacks=callbacks, taken=taken, struck=struck.is_set())


def _answer(pipe: Connection, daemon: Daemon, fault: str, struck: threading.Event) -> None:
    try:
        pipe.recv()
        daemon.strike(fault)
        struck.set()
        pipe.send(None)
    except (EOFError, OSError):
        pass


def _work(ctx: Context, engine: Engine) -> None:
    """Saves, loads that are parked, one that is cancelled, decoding across a boundary."""
    prompt, other = ctx.tokens(49), ctx.tokens(20)
    ctx.ask(engine, prompt, 3)
    engine.idle(0.2)
    ctx.flush(engine)
    first = engine.submit(prompt, 10)
    second = engine.submit(other, 10)
    engine.run(first, second)
    engine.idle(0.05)
    ctx.flush(engine)
    parked = engine.submit([*prompt, 1, 2], 2)
    engine.cancel_when_parked(parked)
    engine.run(parked)
    engine.forget_cache()
    ctx.ask(engine, ctx.tokens(60), 4)
    ctx.flush(engine)
    ctx.ask(engine, prompt, 4)


def _stalls(plan: Plan, slow: list[tuple[int, int, str, float]], healed: list[int], away_s: float) -> list[Violation]:
    """No callback waits longer than the deadline. A quarter of it each is free; what goes beyond is one deadline in all
    until the daemon runs again, and one more each TRUSTED_AFTER_S.

    A slow daemon answers now and then, and may be trusted again each time.
    """
    found = []
    waits_allowed = plan.waits + away_s / TRUSTED_AFTER_S
    if plan.fault == "slow":
        waits_allowed += int(away_s / SLOW_CALL_S) + 1
    allowed_ms = waits_allowed * plan.deadline_ms
    for rank, number, name, seconds in slow:
        if seconds * 1e3 > plan.deadline_ms + plan.slack_ms:
            found.append(Violation(TOO_SLOW, f"{name} (callback {number}) took {seconds * 1e3:.1f} ms", rank, 0))
    for rank in {entry[0] for entry in slow}:
        # Of another rank it is not known how far it was when the fault came.
        first = plan.number if rank == plan.rank else 0
        waits = [entry for entry in slow if entry[0] == rank and first <= entry[1] <= healed[rank]]
        waited_ms = sum(max(0.0, seconds * 1e3 - plan.deadline_ms / 4) for *_, seconds in waits)
        if waited_ms > allowed_ms:
            longest = sorted(waits, key=lambda entry: -entry[3])[:5]
            told = ", ".join(f"{name} (callback {number}) {s * 1e3:.1f} ms" for _, number, name, s in longest)
            found.append(Violation(TOO_SLOW, f"callbacks waited {waited_ms:.1f} ms too long in all: {told}", rank, 0))
    return found
