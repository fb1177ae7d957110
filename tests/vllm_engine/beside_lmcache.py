"""Time to first token of a host hit on the CPU, beside LMCache's daemon: two servers, asked in turn.

    setup.sh VENV 0.32.0 lmcache
    VENV/bin/python beside_lmcache.py --kvbm target/ci/kvbm --model models/tiny --lmcache VENV/bin/lmcache

Needs our package in the same environment, 5 GB of memory and a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from daemon import Node
from served import ONE_THREAD, Served, free_port, kvbm_config, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lmcache", default="lmcache", help="the command")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    port = free_port()
    lmcache = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            "lmcache.mp.mq_timeout": 60.0,
        },
    }
    asked = prompts(9, options.prompts, options.prompt_tokens)
    times: dict[str, list[float]] = {"kvbm": [], "lmcache": []}
    cold: dict[str, list[float]] = {"kvbm": [], "lmcache": []}
    found = {"kvbm": 0, "lmcache": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = Node(options.kvbm, folder, "--cpu-cache-gb", "1", held=False)
        node.start()
        daemon = subprocess.Popen(
            [
                *shlex.split(options.lmcache),
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--http-host",
                "127.0.0.1",
                "--http-port",
                str(free_port()),
                "--l1-size-gb",
                "1",
                "--eviction-policy",
                "LRU",
                "--chunk-size",
                "256",
                "--supported-transfer-mode",
                "auto",
            ],
            stdout=open(folder / "lmcache.log", "ab"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "LMCACHE_TRACK_USAGE": "false"},
        )
        servers: dict[str, Served] = {}
        try:
            time.sleep(20)
            ours = kvbm_config(node.socket, lookup_deadline_ms=200)
            servers["kvbm"] = Served(folder, options.model, ours, **ONE_THREAD)
            servers["lmcache"] = Served(folder, options.model, lmcache, LMCACHE_TRACK_USAGE="false", **ONE_THREAD)
            for at in range(options.rounds + 1):
                for prompt in asked:
                    for which, server in servers.items():
                        server.reset()
                        answer = server.ask(prompt, 1)
                        if at == 0:
                            cold[which].append(answer["ms"])
                            continue
                        times[which].append(answer["ms"])
                        found[which] += answer["cached"] >= options.prompt_tokens // 256 * 256 - 256
                if at == 0:
                    time.sleep(5)
        except AssertionError:
            print((folder / "lmcache.log").read_text()[-3000:])
            raise
        finally:
            for server in servers.values():
                server.kill()
            daemon.kill()
            node.close()
    for which, all_of_them in times.items():
        quarter = statistics.quantiles(all_of_them, n=4)
        print(
            f"{which}: host hit ms p50 {quarter[1]:.1f} (p25 {quarter[0]:.1f}, p75 {quarter[2]:.1f}), found "
            f"{found[which]} of {len(all_of_them)}; cold p50 {statistics.median(cold[which]):.1f}"
        )
    ratio = statistics.median(times["kvbm"]) / statistics.median(times["lmcache"])
    print(f"kvbm / lmcache: {ratio:.2f}")
    sys.exit(ratio > 0.7)


if __name__ == "__main__":
    main()
