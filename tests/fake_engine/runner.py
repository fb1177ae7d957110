"""Runs scenarios, each in a process of its own, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from .engine import EngineGone
from .faults import RAISED, Violation
from .parentage import die_with_parent
from .scenarios import ONLY, REGISTRY, Context, Options

LIMIT_S = 180.0


@dataclass
class Outcome:
    name: str
    seed: int
    violations: list[Violation] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    callbacks: list[int] = field(default_factory=list)
    """Of each rank, in a drill until the daemon was healed."""
    taken: float = 0.0
    struck: bool = False
    """Of a drill: its fault happened."""


def names(chosen: str, api: str) -> list[str]:
    """Scenarios that a choice means: one, several with commas, or `all`."""
    every = [name for name in REGISTRY if ONLY.get(name, api) == api]
    if chosen == "all":
        return every
    for name in chosen.split(","):
        if name not in REGISTRY:
            raise SystemExit(f"no scenario {name!r}; there are {', '.join(REGISTRY)}")
        if name not in every:
            raise SystemExit(f"scenario {name!r} is of {ONLY[name]} only")
    return chosen.split(",")


def run_one(options: Options, name: str, seed: int) -> Outcome:
    """In this process."""
    begin = time.monotonic()
    ctx = Context(options, name, seed)
    try:
        REGISTRY[name](ctx)
    except EngineGone:
        pass
    outcome = Outcome(name, seed, ctx.finish(), taken=time.monotonic() - begin)
    for engine in ctx.engines:
        for callback, values in engine.seconds.items():
            outcome.seconds.setdefault(callback, []).extend(values)
    return outcome


@dataclass(frozen=True)
class Job:
    name: str
    seed: int
    run: Callable[[], Outcome]


def run_many(
    options: Options, jobs: Iterable[tuple[str, int]], workers: int, seconds: float | None = None
) -> Iterable[Outcome]:
    """Scenarios with their seeds."""
    return run_jobs([Job(name, seed, partial(run_one, options, name, seed)) for name, seed in jobs], workers, seconds)


def run_jobs(jobs: Iterable[Job], workers: int, seconds: float | None = None) -> Iterable[Outcome]:
    """Each job in a forked process, `workers` at a time, as they end. After so many seconds no more are begun."""
    context = multiprocessing.get_context("fork")
    waiting = list(jobs)[::-1]
    running: dict[Connection, tuple[Any, Job, float]] = {}
    end = None if seconds is None else time.monotonic() + seconds
    while waiting or running:
        if end is not None and time.monotonic() > end:
            waiting.clear()
        while waiting and len(running) < workers:
            job = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(os.getpid(), job, theirs))
            process.start()
            theirs.close()
            running[mine] = (process, job, time.monotonic())
        for ready in wait(list(running), timeout=1.0):
            assert isinstance(ready, Connection)
            process, job, _ = running.pop(ready)
            try:
                yield pickle.loads(ready.recv_bytes())
            except EOFError:
                detail = "the scenario's process ended without a result"
                yield Outcome(job.name, job.seed, [Violation(RAISED, detail, 0, 0, fatal=True)])
            ready.close()
            process.join()
        for process, _, begin in running.values():
            if time.monotonic() - begin > LIMIT_S:
                process.terminate()


def _child(parent: int, job: Job, result: Connection) -> None:
    die_with_parent(parent)
    outcome = job.run()
    outcome.name = job.name
    result.send_bytes(pickle.dumps(outcome))
    result.close()
    os._exit(0)
