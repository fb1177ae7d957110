"""The daemon is killed, stopped and started again under a serving vLLM.

    drill.py --kvbm target/ci/kvbm --model models/tiny

Every request is one that host memory has, for the engine's own cache is emptied before each. In each phase: none may
fail, all must say what they said before, and none may take longer than the slowest without any daemon, and 100 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon import Node, wait_until
from served import Served, kvbm_config, prompts

TOKENS = 4
DELAY_MS = 100


class Drill:
    def __init__(self, server: Served, asked: list[list[int]]) -> None:
        self.server, self.asked = server, asked
        self.said: dict[int, str] = {}
        self.failures: list[str] = []
        self.slowest = 0.0

    def finds(self) -> bool:
        self.server.reset()
        return bool(self.server.ask(self.asked[0], TOKENS)["cached"])

    def phase(
        self, name: str, count: int, at_third: Callable[[], None] | None = None, judged: bool = True
    ) -> list[dict[str, Any]]:
        """`count` requests, one after the other; `at_third` happens in the middle of the third."""
        seen = []
        for at in range(count):
            index = at % len(self.asked)
            self.server.reset()
            if at_third and at == 2:
                threading.Timer(0.004, at_third).start()
            answer = self.server.ask(self.asked[index], TOKENS)
            if self.said.setdefault(index, answer["text"]) != answer["text"]:
                self.failures.append(f"{name}: request {at} said {answer['text']!r} instead of {self.said[index]!r}")
            seen.append(answer)
        times = sorted(one["ms"] for one in seen)
        found = sum(one["cached"] > 0 for one in seen)
        print(
            f"{time.strftime('%H:%M:%S')} {name}: {count} requests, {found} from the cache, "
            f"ms p50 {statistics.median(times):.0f}, longest {times[-1]:.0f}, second {times[-2]:.0f}",
            flush=True,
        )
        if judged and times[-1] > self.slowest + DELAY_MS:
            self.failures.append(f"{name}: a request took {times[-1]:.0f} ms, without a daemon {self.slowest:.0f}")
        return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=40, help="in each phase")
    parser.add_argument("--prompt-tokens", type=int, default=800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = Node(options.kvbm, folder, "--cpu-cache-gb", "0.5")
        server = Served(folder, options.model, kvbm_config(folder / "kvbm.sock"))
        try:
            drill = Drill(server, prompts(5, 20, options.prompt_tokens))
            drill.phase("warming up", 10, judged=False)
            alone = drill.phase("no daemon", options.requests, judged=False)
            drill.slowest = max(one["ms"] for one in alone)
            node.start()
            wait_until("a block is found", drill.finds)
            drill.phase("first asked", 20)
            wait_until("all is saved", lambda: node.host_blocks() >= 20 * ((options.prompt_tokens + TOKENS - 1) // 32))
            found = drill.phase("found", options.requests)
            if sum(one["cached"] > 0 for one in found) < options.requests - 2:
                drill.failures.append("what was saved was not found")
            drill.phase("killed", options.requests, node.kill)
            node.start()
            drill.phase("started again", options.requests)
            wait_until("caching resumes", drill.finds)
            drill.phase("found again", options.requests)
            drill.phase("stopped", options.requests, node.stop)
            drill.phase("goes on", options.requests, node.go_on)
            wait_until("caching resumes", drill.finds)
            drill.phase("found at last", options.requests)
        finally:
            server.kill()
            node.close()
        if drill.failures:
            print((folder / "daemon.log").read_text()[-1500:], server.log.read_text()[-2500:])
    print("drill of vLLM: " + ("passed" if not drill.failures else "FAILED: " + "; ".join(drill.failures)))
    sys.exit(bool(drill.failures))


if __name__ == "__main__":
    main()
