"""The connector in a real vLLM engine on the CPU: `check.py --kvbm target/ci/kvbm --model models/tiny`.

Four runs of the same random conversations, one request at a time:

* *own*: the engine with its own prefix cache, which is never emptied
* *cold*: the same engine, its cache emptied before each request
* *kvbm*: with our connector; the engine's cache is emptied, the engine and the daemon are killed and started again in
  between, at random
* *liar*: a connector that claims to have loaded what it has not, which the comparison has to catch

Own and kvbm find the same prefixes, so they compute the same numbers: tokens, cached tokens and the bytes of every
complete block must be equal. A cold engine computes prefixes in other shapes, whose sums differ in their last bits: a
difference in tokens is excused only where its two best tokens are nearly equal, and seldom.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conversations import Conversation, conversations, order
from daemon import Node, wait_until
from engine import Engine

BLOCK = 32
GAP = 0.05
EXCUSED = 0.01
Results = dict[tuple[int, int], dict[str, Any]]


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Run:
    """All conversations, one request after the other."""

    def __init__(self, seed: int, count: int) -> None:
        self.all = conversations(seed, count)
        self.order = order(seed, self.all)
        self.said: list[list[int]] = [[] for _ in self.all]
        self.results: Results = {}
        self.stored: set[bytes] = set()

    def turn(self, engine: Engine, index: int, turn: int) -> None:
        one: Conversation = self.all[index]
        prompt = one.prompt(turn, self.said[index])
        result = engine.generate(prompt, one.answers[turn])
        self.results[index, turn] = {**result, "prompt": prompt}
        self.said[index] = prompt + result["tokens"]
        whole = (len(self.said[index]) - 1) // BLOCK
        for end in range(1, whole + 1):
            self.stored.add(repr(self.said[index][: end * BLOCK]).encode())


def own(engine: Engine, run: Run) -> Results:
    for index, turn in run.order:
        run.turn(engine, index, turn)
    return run.results


def cold(engine: Engine, of: Results, run: Run) -> Results:
    """What an engine without a cache says to the same prompts."""
    seen = {}
    for index, turn in run.order:
        assert engine.ask("reset")
        result = engine.generate(of[index, turn]["prompt"], run.all[index].answers[turn])
        assert result["cached"] == 0
        seen[index, turn] = result
    return seen


class Disturbed:
    """The connector's run: what happens between two requests is drawn."""

    def __init__(self, options: argparse.Namespace, folder: Path, run: Run) -> None:
        self.options, self.folder, self.run = options, folder, run
        self.rng = random.Random(options.seed + 2)
        self.node = Node(options.kvbm, folder, "--cpu-cache-gb", "1")
        self.node.start()
        self.counts = {"reset": 0, "engine": 0, "daemon": 0}
        self.engine = self._engine()

    def _engine(self) -> Engine:
        # On a busy machine a lookup may take long; here it is asked what is found, not how fast.
        extra = {
            "kvbm.endpoint": f"unix:{self.node.socket}",
            "kvbm.lookup_deadline_ms": 1000,
            "kvbm.detach_after_ms": 20000,
            "kvbm.by_layer": "true",
        }
        engine = Engine(self.folder, self.options.model, "Recorded", extra)
        self._attached(engine)
        return engine

    def _attached(self, engine: Engine) -> None:
        wait_until("the engine is attached", engine.attached)

    def results(self) -> Results:
        turns = len(self.run.order)
        engines = {
            turns * at // (self.options.engine_restarts + 1) for at in range(1, self.options.engine_restarts + 1)
        }
        daemons = set(self.rng.sample(range(1, turns), self.options.daemon_restarts))
        for at, (index, turn) in enumerate(self.run.order):
            if at in engines:
                self._saved()
                self.engine.kill()
                self.engine = self._engine()
                self.counts["engine"] += 1
            if at in daemons:
                self._saved()
                self.node.kill()
                self.node.start()
                # Its sessions are new.
                self._attached(self.engine)
                self.counts["daemon"] += 1
            if self.rng.random() < 0.6:
                self._saved()
                assert self.engine.ask("reset")
                self.counts["reset"] += 1
            self.run.turn(self.engine, index, turn)
        self._saved()
        return self.run.results

    def _saved(self) -> None:
        """All complete blocks are in host memory, and no others."""
        wanted = len(self.run.stored)
        wait_until(f"{wanted} blocks are in host memory", lambda: self.node.host_blocks() == wanted)

    def close(self) -> None:
        self.engine.kill()
        self.node.close()


def differences(left: Results, right: Results, what: str) -> list[tuple[int, int]]:
    return [at for at in left if at in right and left[at][what] != right[at][what]]


def excused(reference: dict[str, Any], other: dict[str, Any]) -> bool:
    first = next(at for at, (a, b) in enumerate(zip(reference["tokens"], other["tokens"], strict=False)) if a != b)
    return bool(reference["gaps"][first] < GAP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=110)
    parser.add_argument("--engine-restarts", type=int, default=2)
    parser.add_argument("--daemon-restarts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(options.seed, options.conversations)
        note(f"{len(run.all)} conversations of {len(run.order)} turns, seed {options.seed}")
        engine = Engine(folder, options.model, "Idle")
        reference = own(engine, run)
        note("own: done")
        without = cold(engine, reference, run)
        engine.kill()
        note("cold: done")

        disturbed = Disturbed(options, folder, Run(options.seed, options.conversations))
        try:
            seen = disturbed.results()
            figures = disturbed.engine.ask("figures")
        finally:
            disturbed.close()
        note(f"kvbm: done, {disturbed.counts}, {figures['worker']}")
        if not figures["worker"]["layered_loads"]:
            failures.append("no pass waited for layers")
        for what in ("tokens", "cached", "sums"):
            wrong = differences(reference, seen, what)
            note(f"kvbm beside own, {what}: {len(reference) - len(wrong)} of {len(reference)} equal")
            for at in wrong[:5]:
                note(f"  conversation {at[0]}, turn {at[1]}: {reference[at][what]} and {seen[at][what]}")
            if wrong:
                failures.append(f"{what} of {len(wrong)} requests")
        unlike = differences(without, seen, "tokens")
        unexcused = [at for at in unlike if not excused(without[at], seen[at])]
        note(f"kvbm beside cold: {len(unlike)} of {len(seen)} differ, {len(unexcused)} of them without excuse")
        if unexcused or len(unlike) > max(1, EXCUSED * len(seen)):
            failures.append("tokens beside a cold engine")

        few = Run(options.seed, options.conversations)
        few.order = [at for at in few.order if at[0] < 8]
        liar = Engine(folder, options.model, "Liar")
        lies = own(liar, few)
        liar.kill()
        caught = {what: len(differences(reference, lies, what)) for what in ("tokens", "sums", "cached")}
        note(f"liar: {len(lies)} requests, found wrong: {caught}")
        if not all(caught.values()):
            failures.append("a connector that lies was not caught")
    print("vLLM: " + ("passed" if not failures else f"FAILED: {'; '.join(failures)}"))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
