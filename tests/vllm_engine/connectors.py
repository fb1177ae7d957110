"""One vLLM engine with several connectors in turn, on a machine with GPUs: for `compare.py` and `interference.py`.

Each mode is an engine of its own, in a process of its own (dummy weights of the shape of Llama-3-8B, or --model DIR),
started `--starts` times in turn with the others; with several `--gpus`, starts run side by side, each with daemons of
its own.

Connectors that need a daemon find it started: `kvbm` is started here; for lmcache and pegaflow name commands by
--lmcache-daemon and --pegaflow-daemon, in which {port} is filled in, or start them yourself. Those run while their mode
does, so that each has the machine's memory to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from daemon import Node, wait_until

LLAMA_3_8B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    bos_token_id=128000,
    eos_token_id=128001,
    attention_bias=False,
    mlp_bias=False,
)
KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2
LMCACHE_PORT = 15555
PEGAFLOW_PORT = 50055
PATIENCE_S = 900
DAEMON_PATIENCE_S = 120


def add_arguments(parser: argparse.ArgumentParser, modes: str) -> None:
    parser.add_argument("--modes", default=modes)
    parser.add_argument("--starts", type=int, default=2)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    parser.add_argument("--gpus", default=visible, help="each start runs on the next of them, as many side by side")
    parser.add_argument("--model", type=Path, help="instead of dummy weights")
    parser.add_argument("--kvbm", type=Path, help="the binary")
    parser.add_argument("--host-gb", type=float, default=24, help="host memory, of ours and of native offloading")
    parser.add_argument(
        "--daemon", default="--eviction-policy lru", help="more settings of our daemon; the others keep what is newest"
    )
    parser.add_argument("--lmcache-daemon")
    parser.add_argument("--pegaflow-daemon")
    parser.add_argument(
        "--graphs", action="store_true", help="decode by CUDA graphs, recorded when the engine starts, uncompiled"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--socket", default="", help=argparse.SUPPRESS)
    parser.add_argument("--lane", type=int, default=0, help=argparse.SUPPRESS)


def transfer_config(options: argparse.Namespace) -> dict[str, Any] | None:
    """What `--kv-transfer-config` says for the mode of this process."""
    ours = {
        "kv_connector": "KvbmConnector",
        "kv_connector_module_path": "kvbm_connector.vllm",
        "kv_connector_extra_config": {
            "kvbm.endpoint": f"unix:{options.socket}",
            "kvbm.cross_layer": str(options.one == "kvbm").lower(),
        },
    }
    configs: dict[str, dict[str, Any] | None] = {
        "none": None,
        "kvbm": ours,
        "kvbm-per-layer": ours,
        "native": {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(options.host_gb * 1e9)},
        },
        "lmcache": {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": LMCACHE_PORT + options.lane,
                "lmcache.mp.mq_timeout": 60.0,
            },
        },
        "pegaflow": {
            "kv_connector": "PegaKVConnector",
            "kv_connector_module_path": "pegaflow.connector",
            "kv_connector_extra_config": {"pegaflow.port": PEGAFLOW_PORT + options.lane},
        },
    }
    config = configs[options.one]
    return None if config is None else {**config, "kv_role": "kv_both"}


def make_llm(options: argparse.Namespace, max_model_len: int, **more: Any) -> Any:
    """The engine of this process."""
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        PYTHONHASHSEED="0",
        LMCACHE_TRACK_USAGE="false",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    )
    from vllm import LLM

    folder = options.model
    if folder is None:
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
        more["load_format"] = "dummy"
    config = transfer_config(options)
    if config is not None:
        more.update(kv_transfer_config=config, disable_hybrid_kv_cache_manager=True)
    if options.graphs:
        more["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=not options.graphs,
        max_model_len=max_model_len,
        dtype="bfloat16",
        gpu_memory_utilization=0.6,
        **more,
    )


def tell(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """What this process found, to the one that started it."""
    options.result.write_text(json.dumps(result))


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each engine told. Those of one start share daemons, and follow each other."""
    gpus = options.gpus.split(",")
    results: list[dict[str, Any]] = []

    def lane(number: int) -> None:
        with tempfile.TemporaryDirectory() as name:
            for _ in range(number, options.starts, len(gpus)):
                one_start(options, number, gpus[number], Path(name), results.append)

    with ThreadPoolExecutor(len(gpus)) as lanes:
        # An error of any of them is told.
        list(lanes.map(lane, range(len(gpus))))
    return results


def said_by(command: list[str], environment: dict[str, str], log: Path) -> str:
    """What a program and those that it started said. None of them is left afterwards."""
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            out.write(f"no end after {PATIENCE_S} s\n".encode())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


@contextlib.contextmanager
def rival(command: str | None, port: int, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Somebody else's daemon, if a command is named, from when it can be reached."""
    if command is None:
        yield
        return
    with open(log, "wb") as out:
        daemon = subprocess.Popen(
            shlex.split(command.replace("{port}", str(port))), env=environment, stdout=out, stderr=out
        )
        try:
            try:
                wait_until(f"{command.split()[0]} listens on {port}", lambda: is_open(port), DAEMON_PATIENCE_S)
            except AssertionError as error:
                # The engine will say what it misses.
                print(f"{error}\n{log.read_text(errors='replace')[-2000:]}", flush=True)
            yield
        finally:
            daemon.kill()
            daemon.wait()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def one_start(
    options: argparse.Namespace, lane: int, gpu: str, folder: Path, add: Callable[[dict[str, Any]], None]
) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    rivals = {
        "lmcache": (options.lmcache_daemon, LMCACHE_PORT + lane),
        "pegaflow": (options.pegaflow_daemon, PEGAFLOW_PORT + lane),
    }
    node = None
    try:
        if options.kvbm:
            settings = ["--cpu-cache-gb", str(options.host_gb), *options.daemon.split()]
            node = Node(options.kvbm, folder, *settings, held=False)
            node.start()
        for mode in options.modes.split(","):
            socket, result = str(node.socket) if node else "", folder / "result.json"
            result.unlink(missing_ok=True)
            own = ["--one", mode, "--socket", socket, "--lane", str(lane), "--result", str(result)]
            command, port = rivals.get(mode, (None, 0))
            with rival(command, port, environment, folder / f"{mode}-daemon.log"):
                said = said_by([sys.executable, *sys.argv, *own], environment, folder / f"{mode}.log")
            if result.exists():
                text = result.read_text()
                add(json.loads(text))
                print(f"RESULT {text}", flush=True)
            else:
                print(f"{mode} on GPU {gpu}: no result\n{said[-4000:]}", flush=True)
    finally:
        if node:
            print((folder / "daemon.log").read_text()[-3000:])
            node.close()
