"""The daemon is killed, stopped and started again under a serving vLLM: what does one request lose by that?

    drill.py --kvbm target/ci/kvbm --model models/tiny

The same prompts are asked without a daemon, with a healthy one, and with one that is struck while the request is under
way, at another moment each time. What a request loses is what it takes beyond the median of the same prompt without a
daemon; what those without a daemon differ by among themselves is shown beside it. Host memory has every prompt, for the
engine's own cache is emptied before each request. None may fail, all must say what they said before, and none may lose
more than 100 ms.
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

from daemon import Node, wait_until
from served import ONE_THREAD, Served, kvbm_config, prompts

TOKENS = 4
DELAY_MS = 100
# Of the moments at which a request is struck, ms after it was sent: a found prompt takes some 20.
MOMENTS = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20)


class Drill:
    def __init__(self, server: Served, asked: list[list[int]]) -> None:
        self.server, self.asked = server, asked
        self.said: dict[int, str] = {}
        self.failures: list[str] = []
        self.times: dict[str, list[tuple[int, float]]] = {}
        self.found: dict[str, int] = {}
        self.next = 0

    def ask(self, name: str, meanwhile: Callable[[], None] | None = None, after_ms: float = 0) -> None:
        """The next prompt, and what is done while it is under way."""
        index = self.next % len(self.asked)
        self.next += 1
        self.server.reset()
        strike = threading.Timer(after_ms / 1e3, meanwhile) if meanwhile else None
        if strike:
            strike.start()
        answer = self.server.ask(self.asked[index], TOKENS)
        if strike:
            strike.join()
        if self.said.setdefault(index, answer["text"]) != answer["text"]:
            self.failures.append(f"{name}: prompt {index} said {answer['text']!r} instead of {self.said[index]!r}")
        self.times.setdefault(name, []).append((index, answer["ms"]))
        self.found[name] = self.found.get(name, 0) + (answer["cached"] > 0)

    def each(self, name: str, rounds: int = 1) -> None:
        for _ in range(rounds * len(self.asked)):
            self.ask(name)

    def finds(self) -> bool:
        self.server.reset()
        return bool(self.server.ask(self.asked[0], TOKENS)["cached"])

    def judge(self) -> None:
        alone = [[ms for at, ms in self.times["no daemon"] if at == index] for index in range(len(self.asked))]
        usual = [statistics.median(times) for times in alone]
        print(f"without a daemon a request takes {statistics.median(usual):.0f} ms")
        noise = max(ms - usual[index] for index, ms in self.times["no daemon"])
        if noise > DELAY_MS:
            self.failures.append(
                f"the machine is too busy to judge by {DELAY_MS} ms: without a daemon a prompt takes up to "
                f"{noise:.0f} ms longer than usual; run it when there is less to do"
            )
        if self.found["found"] < len(self.times["found"]) - 4:
            self.failures.append("what was saved was not found")
        for name, times in self.times.items():
            lost = sorted(ms - usual[index] for index, ms in times)
            print(
                f"{name}: {len(lost)} requests, {self.found[name]} from the cache; lost, ms: p50 "
                f"{statistics.median(lost):.0f}, second {lost[-2]:.0f}, longest {lost[-1]:.0f}"
            )
            if noise <= DELAY_MS < lost[-1]:
                self.failures.append(f"{name}: a request lost {lost[-1]:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--strikes", type=int, default=20, help="of each kind")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = Node(options.kvbm, folder, "--cpu-cache-gb", "0.5")
        server = Served(folder, options.model, kvbm_config(folder / "kvbm.sock"), **ONE_THREAD)
        drill = Drill(server, prompts(5, options.prompts, options.prompt_tokens))
        try:
            drill.each("warming up")
            del drill.times["warming up"]
            drill.each("no daemon", 3)
            node.start()
            wait_until("a block is found", drill.finds)
            drill.each("first asked")
            blocks = options.prompts * ((options.prompt_tokens + TOKENS - 1) // 32)

            def all_saved() -> bool:
                if node.host_blocks() >= blocks:
                    return True
                # Blocks that the engine gives to the next request before they were copied are not saved, until they are
                # computed again.
                drill.each("asked again")
                return False

            wait_until(f"all {blocks} blocks are saved", all_saved)
            drill.each("found", 2)
            for at in range(options.strikes):
                for struck, strike, restored, restore in (
                    ("killed", node.kill, "started again", node.launch),
                    ("stopped", node.stop, "goes on", node.go_on),
                ):
                    wait_until("blocks are found", drill.finds)
                    drill.ask("found")
                    drill.ask(struck, strike, MOMENTS[at % len(MOMENTS)])
                    for _ in range(2):
                        drill.ask(f"after it was {struck}")
                    drill.ask(restored, restore, MOMENTS[at % len(MOMENTS)])
                    for _ in range(3):
                        drill.ask(f"after it {'goes on' if struck == 'stopped' else 'was started again'}")
                    wait_until("the daemon answers", lambda: node.status() is not None)
            node.kill()
            drill.each("no daemon", 2)
            drill.judge()
        except AssertionError as error:
            drill.failures.append(str(error))
            if status := node.status():
                print(status)
        finally:
            server.kill()
            node.close()
        if drill.failures:
            print((folder / "daemon.log").read_text()[-1500:], server.log.read_text()[-2500:])
    print(
        f"{time.strftime('%H:%M:%S')} drill of vLLM: "
        + ("passed" if not drill.failures else "FAILED: " + "; ".join(drill.failures))
    )
    sys.exit(bool(drill.failures))


if __name__ == "__main__":
    main()
