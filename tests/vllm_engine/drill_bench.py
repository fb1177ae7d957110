"""`vllm bench serve` goes on while the daemon is killed, stopped and started again.

    drill_bench.py --kvbm target/ci/kvbm --model models/tiny

The same requests are sent at the same moments in each run of vLLM's own benchmark: without a daemon, with a healthy
one, and with one that is struck again and again. What a request loses is what it takes beyond the median of the same
request in the runs without a daemon; what those differ by among themselves is shown beside it. The engine's own cache
is too small to have a prompt twice, so what is found comes from host memory. None may fail, all must say what they said
before, and none may lose more than 100 ms. Wants a machine with little else to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from daemon import Node, wait_until
from served import ONE_THREAD, Served, kvbm_config

DELAY_MS = 100
PER_SECOND = 4
INPUT_TOKENS = 800
OUTPUT_TOKENS = 4
# Of the engine's own cache: a few prompts, and what a request may have at most.
OWN_BLOCKS = 200
BENCH = (
    "import argparse, vllm.benchmarks.serve as serve;"
    "parser = argparse.ArgumentParser(); serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
"""What `vllm bench serve` does, without what all its other commands need."""


@dataclass
class Run:
    ms: list[float]
    texts: list[str]
    errors: list[str]


def bench(server: Served, model: Path, folder: Path, requests: int) -> Run:
    result = folder / f"bench-{time.monotonic_ns()}.json"
    settings = {
        "--backend": "openai", "--base-url": f"http://127.0.0.1:{server.port}", "--endpoint": "/v1/completions",
        "--model": model, "--served-model-name": "tiny", "--dataset-name": "random", "--seed": 7,
        "--random-input-len": INPUT_TOKENS, "--random-output-len": OUTPUT_TOKENS, "--num-prompts": requests,
        "--request-rate": PER_SECOND, "--burstiness": 1e6, "--temperature": 0,
        "--result-dir": folder, "--result-filename": result.name,
    }
    arguments = [str(word) for pair in settings.items() for word in pair]
    switches = ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    command = [sys.executable, "-c", BENCH, *arguments, *switches]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"vllm bench serve: {done.stderr[-3000:]}")
    said = json.loads(result.read_text())
    took = [(first + sum(rest)) * 1e3 for first, rest in zip(said["ttfts"], said["itls"], strict=True)]
    return Run(took, said["generated_texts"], [error for error in said["errors"] if error])


class Strikes:
    """Kills, starts, stops and resumes the daemon in turn until it is told to end; leaves it running."""

    def __init__(self, node: Node) -> None:
        self.node, self.count = node, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        moments = random.Random(3)
        steps = [(self.node.kill, 0.6), (self.node.launch, 2.0), (self.node.stop, 1.2), (self.node.go_on, 1.5)]
        for step, pause_s in itertools.cycle(steps):
            if self._over.is_set() and step == self.node.kill:
                return
            step()
            self.count += 1
            # At another moment of a request each time.
            self._over.wait(pause_s + moments.random() / PER_SECOND)

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.count


def judge(runs: dict[str, list[Run]], found: float) -> list[str]:
    failures = []
    alone = runs["no daemon"]
    usual = [statistics.median(times) for times in zip(*(run.ms for run in alone), strict=True)]
    print(f"without a daemon a request takes {statistics.median(usual):.0f} ms; {found:.0f} blocks came from the host")
    noise = max(ms - of for run in alone for ms, of in zip(run.ms, usual, strict=True))
    if noise > DELAY_MS:
        failures.append(f"the machine is too busy to judge: without a daemon a request loses up to {noise:.0f} ms")
    for name, some in runs.items():
        lost = sorted(ms - of for run in some for ms, of in zip(run.ms, usual, strict=True))
        print(
            f"{name}: {len(lost)} requests; lost, ms: p50 {statistics.median(lost):.0f}, p99 "
            f"{lost[int(len(lost) * 0.99)]:.0f}, second {lost[-2]:.0f}, longest {lost[-1]:.0f}"
        )
        if noise <= DELAY_MS < lost[-1]:
            failures.append(f"{name}: a request lost {lost[-1]:.0f} ms")
        failures += [f"{name}: a request failed: {error[:300]}" for run in some for error in run.errors]
        wrong = sum(text != of for run in some for text, of in zip(run.texts, alone[0].texts, strict=True))
        if wrong:
            failures.append(f"{name}: {wrong} answers differ")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=60, help="of each run")
    parser.add_argument("--struck-runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = Node(options.kvbm, folder, "--cpu-cache-gb", "1")
        settings = ["--num-gpu-blocks-override", str(OWN_BLOCKS)]
        server = Served(folder, options.model, kvbm_config(folder / "kvbm.sock"), *settings, **ONE_THREAD)

        def run() -> Run:
            return bench(server, options.model, folder, options.requests)

        try:
            run()
            runs = {"no daemon": [run(), run()]}
            node.start()
            wait_until("the engine is attached", lambda: bool((node.status() or {}).get("engine_pools")))
            runs["first asked"] = [run()]
            runs["found"] = [run()]
            found = server.figures()["loaded_blocks"]
            blocks = options.requests * ((INPUT_TOKENS - 1) // 32)
            failures = [] if found >= 0.9 * blocks else [f"{found:.0f} of {blocks} blocks were found"]
            strikes = Strikes(node)
            runs["struck"] = [run() for _ in range(options.struck_runs)]
            print(f"struck {strikes.end()} times")
            loaded = server.figures()["loaded_blocks"]
            wait_until("the daemon answers", lambda: node.status() is not None)
            runs["afterwards"] = [run()]
            if server.figures()["loaded_blocks"] - loaded < 0.5 * blocks:
                failures.append("little was found when the daemon was left alone again")
            node.kill()
            runs["no daemon"].append(run())
            failures += judge(runs, found)
        finally:
            server.kill()
            node.close()
        if failures:
            print((folder / "daemon.log").read_text()[-1500:], server.log.read_text()[-2500:])
    print(
        f"{time.strftime('%H:%M:%S')} vllm bench serve beside strikes: "
        + ("passed" if not failures else "FAILED: " + "; ".join(failures))
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
