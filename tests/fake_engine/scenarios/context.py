"""What every scenario has: engines, prompts of its seed, and expectations."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConnectorNames, EngineConfig
from ..content import VOCABULARY
from ..engine import Engine, EngineGone
from ..faults import EXPECTATION, Violation
from ..rank import Status, Strike


@dataclass(frozen=True)
class Options:
    """How scenarios are run: the connector, the interface, the machine."""

    module: str = "fake_engine.connectors.reference"
    scheduler_class: str = "Scheduler"
    worker_class: str = "Worker"
    server_url: str | None = None
    """None: a directory of the scenario's own, which is what the reference connectors take."""
    api: str = "L1"
    import_path: str | None = None
    overlap: bool = False
    ranks: int = 1
    device: str = "cpu"
    patience_s: float = 20.0
    """How long a request may take."""
    cache: bool = True
    """False: the cache is away on purpose, so nothing needs to be found; everything else has to hold."""
    hit_seconds: float = 10.0
    """A cache may be late: so long a prompt is asked again until what was to be found is found."""


@dataclass
class Context:
    options: Options
    name: str
    seed: int
    strike: Strike | None = None
    strike_rank: int = 0
    engines: list[Engine] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.name} {self.seed}")
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.directory = tempfile.mkdtemp(prefix="fake-engine-", dir=base)
        # Prompts differ from run to run, so that a daemon that lives longer than one run is cold for each.
        self._nonce = random.SystemRandom().randrange(VOCABULARY) if self.options.server_url else 0

    def engine(self, **changes: Any) -> Engine:
        """Starts an engine. `load_ms`, `save_ms` and `capacity` are for the reference connectors only."""
        options = self.options
        settings = {name: changes.pop(name) for name in ("load_ms", "save_ms", "capacity") if name in changes}
        url = options.server_url
        if url is None:
            query = "&".join(f"{name}={value}" for name, value in settings.items())
            url = f"dir:{self.directory}/store?{query}"
        early = options.api == "L1" and options.import_path is None and self.seed % 4 == 3
        import_path = options.import_path or ("old" if options.api == "L1" and self.seed % 2 else "new")
        chosen: dict[str, Any] = {
            "api": options.api,
            "import_path": import_path,
            "early": early,
            "overlap": options.overlap,
            "ranks": options.ranks,
            "device": options.device,
            "free_order": self.random.choice(["lifo", "fifo", "random"]),
            "seed": self.seed,
            "patience_s": options.patience_s,
        }
        names = ConnectorNames(options.module, options.scheduler_class, options.worker_class, url)
        engine = Engine(EngineConfig(names, **(chosen | changes)), self.strike, self.strike_rank)
        self.engines.append(engine)
        if engine.dead and engine.refused:
            self.fail(f"the connector refused to start: {engine.refused}")
        if engine.dead:
            raise EngineGone
        return engine

    def try_engine(self, **changes: Any) -> Engine | None:
        """Starts an engine that may be refused."""
        before = len(self.violations)
        try:
            return self.engine(**changes)
        except EngineGone:
            del self.violations[before:]
            return None

    def tokens(self, count: int) -> list[int]:
        """A prompt of which no other has a prefix."""
        return [self._nonce + 1, *(self.random.randrange(VOCABULARY) for _ in range(count - 1))]

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.fail(otherwise)

    def fail(self, detail: str) -> None:
        self.violations.append(Violation(EXPECTATION, detail, 0, 0))

    def whole(self, engine: Engine, prompt: list[int]) -> int:
        """Tokens of a prompt that a cache can give: whole blocks, and one token is left."""
        size = engine.config.tokens_per_block
        return (len(prompt) - 1) // size * size

    def flush(self, engine: Engine) -> None:
        """Every block of the pool goes to another request, the usual way, and is then free."""
        size = engine.config.tokens_per_block
        blocks = engine.config.pages - (1 if engine.config.max_utilization else 0)
        engine.forget_cache()
        filler = engine.submit(self.tokens(blocks * size - 2), 1)
        engine.run(filler)
        engine.forget_cache()

    def ask(self, engine: Engine, prompt: list[int], max_new_tokens: int = 3, **more: Any) -> Status:
        """One request, to its end."""
        request = engine.submit(prompt, max_new_tokens, **more)
        engine.run(request)
        return engine.status(request)

    def warm(self, engine: Engine, prompt: list[int], want: int | None = None, **more: Any) -> Status:
        """Asks until the cache gives what it must; the engine's own cache is emptied before each time."""
        want = self.whole(engine, prompt) if want is None else want
        return self.until_hit(engine, prompt, want, lambda: self.flush(engine), **more)

    def until_hit(
        self, engine: Engine, prompt: list[int], want: int, before: Callable[[], None], **more: Any
    ) -> Status:
        deadline = time.monotonic() + self.options.hit_seconds
        pause = 0.02
        while True:
            before()
            status = self.ask(engine, prompt, **more)
            if status.local + status.offered == want or not self.options.cache:
                return status
            if status.local + status.offered > want or time.monotonic() > deadline:
                self.fail(f"offered {status.offered} behind {status.local}, not {want} in all, of {len(prompt)}")
                return status
            engine.idle(pause)
            pause = min(2 * pause, 0.5)

    def warm_prefix(self, engine: Engine, prefix: list[int], more_tokens: int) -> None:
        """Asks for a prefix of whole blocks with another end each time, so that no more than it can be found."""
        deadline = time.monotonic() + self.options.hit_seconds
        while True:
            self.flush(engine)
            prompt = prefix + self.tokens(more_tokens)
            status = self.ask(engine, prompt)
            if status.local + status.offered == len(prefix) or not self.options.cache:
                return
            if status.local + status.offered > len(prefix) or time.monotonic() > deadline:
                self.fail(f"offered {status.offered} behind {status.local}, not {len(prefix)} in all, of {len(prompt)}")
                return
            engine.idle(0.05)

    def continued(self, engine: Engine, lengths: list[int], max_new_tokens: int, **more: Any) -> None:
        """Blocks that were filled while decoding are found. Each attempt has new prompts, so that what is found was
        saved while decoding and not by the attempt before. Tokens that no report showed before the last pass was
        launched may be missing: one under the overlap scheduler, and the drafts."""
        size = engine.config.tokens_per_block
        drafts = more.get("draft_tokens", 0)
        unseen = drafts + (1 + drafts if engine.config.overlap else 0)
        deadline = time.monotonic() + self.options.hit_seconds
        pause = 0.02
        while True:
            prompts = [self.tokens(length) for length in lengths]
            ids = [engine.submit(prompt, max_new_tokens, **more) for prompt in prompts]
            engine.run(*ids)
            wholes = [p + list(engine.status(id_).generated[:-1]) for p, id_ in zip(prompts, ids, strict=True)]
            engine.idle(pause)
            missing = []
            for whole in wholes:
                self.flush(engine)
                status = self.ask(engine, [*whole, 1, 2])
                want = len(whole) // size * size
                if not (len(whole) - unseen) // size * size <= status.local + status.offered <= want:
                    missing.append(f"offered {status.offered} behind {status.local}, not {want} in all")
            if not missing or not self.options.cache:
                return
            if time.monotonic() > deadline:
                self.fail(f"blocks filled while decoding: {missing[0]}")
                return
            pause = min(2 * pause, 1.0)

    def finish(self) -> list[Violation]:
        """Ends the engines and gives everything that was wrong."""
        found = self.finish_engines()
        self.remove_directory()
        return found

    def finish_engines(self) -> list[Violation]:
        for engine in self.engines:
            if not engine.dead:
                try:
                    engine.leave()
                except EngineGone:
                    engine.give_up()
        # What an engine saw comes first: it is nearer to the cause than what a scenario missed.
        return [violation for engine in self.engines for violation in engine.violations] + self.violations

    def remove_directory(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


Scenario = Callable[[Context], None]
REGISTRY: dict[str, Scenario] = {}
ONLY: dict[str, str] = {}
"""Scenarios of one interface only."""


def scenario(function: Scenario) -> Scenario:
    REGISTRY[function.__name__] = function
    return function


def only(api: str) -> Callable[[Scenario], Scenario]:
    def mark(function: Scenario) -> Scenario:
        ONLY[function.__name__] = api
        return scenario(function)

    return mark
