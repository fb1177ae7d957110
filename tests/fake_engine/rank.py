"""The process of one rank: it brings the connector up as TensorRT-LLM does and then runs iterations on demand."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from . import stub_modules
from .callbacks import Callbacks
from .comm import Comm
from .config import EngineConfig
from .executor import Executor, Operation
from .faults import RAISED, EngineDead, Violation
from .llm_args import refuse_unsupported
from .manager import ConnectorManager, Vintage
from .memory import KvMemory
from .request import EngineRequest


@dataclass(frozen=True)
class Step:
    operations: list[Operation]
    count: int = 1


@dataclass(frozen=True)
class Audit:
    pass


@dataclass(frozen=True)
class Leave:
    pass


@dataclass(frozen=True)
class Status:
    """A request as its client sees it, and what was reused for it."""

    state: str
    generated: tuple[int, ...]
    local: int
    offered: int
    matched: int
    position: int
    pages: tuple[tuple[int, ...], ...] = ()

    @property
    def over(self) -> bool:
        return self.state in ("saving", "complete", "cancelled")


@dataclass
class Reply:
    """What one rank says to each command."""

    ran: bool = False
    violations: list[Violation] = field(default_factory=list)
    statuses: dict[int, Status] = field(default_factory=dict)
    dead: bool = False
    refused: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    connector_seconds: dict[str, list[float]] = field(default_factory=dict)
    callbacks: int = 0
    slow: list[tuple[int, str, float]] = field(default_factory=list)


Strike = Callable[[int, str], None]


def main(config: EngineConfig, rank: int, pipes: list[Connection], control: Connection, strike: Strike | None) -> None:
    """The life of a rank's process."""
    callbacks = Callbacks(rank, measure=True)
    callbacks.strike = strike
    try:
        executor = bring_up(config, Comm(rank, config.ranks, pipes), callbacks)
    except EngineDead as dead:
        # A registration that says what it does not support is a refusal, like a constructor's.
        refusal = isinstance(dead.__cause__, (NotImplementedError, ValueError))
        violations = [] if refusal else callbacks.violations
        control.send(Reply(dead=True, refused=str(dead.__cause__) if refusal else None, violations=violations))
        return
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        control.send(Reply(dead=True, refused=detail, violations=callbacks.violations))
        return
    control.send(Reply(callbacks=callbacks.number))
    try:
        serve(executor, callbacks, control)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The conductor or another rank is gone: a real rank hangs here until it is killed.
        pass
    # Interpreter exit is what a connector without a shutdown call has.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def bring_up(config: EngineConfig, comm: Comm, callbacks: Callbacks) -> Executor:
    stub_modules.install(config.api, config.import_path, config.early)
    args = config.llm_args(comm.rank)
    refuse_unsupported(args)
    module = importlib.import_module(config.connector.module)
    worker = getattr(module, config.connector.worker_class)
    scheduler = getattr(module, config.connector.scheduler_class) if comm.rank == 0 else None
    vintage = Vintage(config.api, config.early)
    manager = ConnectorManager(vintage, args, config.tokens_per_block, scheduler, worker, comm, callbacks)
    memory = KvMemory(config.geometry(), comm.rank, config.device)
    manager.register(memory)
    if config.watched:
        for half in (manager.scheduler, manager.worker):
            threading.Thread(target=_watch, args=(getattr(half, "figures", None),), daemon=True).start()
    return Executor(config, memory, manager, callbacks)


def _watch(figures: Callable[[], object] | None) -> None:
    while figures is not None:
        figures()
        time.sleep(0.0002)


def serve(executor: Executor, callbacks: Callbacks, control: Connection) -> None:
    while True:
        command = control.recv()
        reply = Reply()
        try:
            if isinstance(command, Step):
                reply.ran = executor.step(command.operations)
                for _ in range(command.count - 1):
                    reply.ran = executor.step([]) and reply.ran
            elif isinstance(command, Audit):
                executor.audit()
        except EngineDead:
            reply.dead = True
        except (EOFError, BrokenPipeError, ConnectionResetError):
            reply.dead = True
        except Exception as error:
            callbacks.violation(RAISED, f"fake engine: {type(error).__name__}: {error}", fatal=True)
            control.send(Reply(dead=True, violations=callbacks.violations))
            raise
        reply.violations, callbacks.violations = callbacks.violations, []
        reply.statuses = {id_: _status(request) for id_, request in executor.requests.items()}
        reply.callbacks = callbacks.number
        if isinstance(command, Leave):
            reply.counts = dict(callbacks.counts)
            reply.seconds = dict(callbacks.seconds)
            reply.connector_seconds = dict(callbacks.connector_seconds)
            reply.slow = callbacks.slow
        control.send(reply)
        if reply.dead or isinstance(command, Leave):
            return
        if reply.ran and not any(r.state.value in ("context", "generation") for r in executor.scheduler.active):
            # Every request is parked: the loop spins, but not on the other processes' cores.
            time.sleep(0.0003)


def _status(request: EngineRequest) -> Status:
    return Status(
        request.state.value,
        tuple(request.tokens[len(request.spec.prompt) :]),
        request.local_match,
        request.offered,
        request.matched_by_connector,
        request.position,
        tuple(tuple(pages) for pages in request.pages),
    )
