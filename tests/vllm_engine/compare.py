"""Time to first token of one vLLM engine with several connectors in turn, on a machine with a GPU.

    compare.py --modes none,native,kvbm,kvbm-per-layer,lmcache,pegaflow --kvbm target/ci/kvbm --starts 2

Each mode is an engine of its own (dummy weights of the shape of Llama-3-8B, or --model DIR), started `--starts` times
in turn with the others. For each prompt: cold, then with the engine's own cache, then with that cache emptied, so that
the KV comes from host memory. The floor is what no connector can be faster than: a hit in the engine's own cache, no
connector, and the bytes of the KV at the rate at which this machine copies pinned memory to the GPU.

Connectors that need a daemon find it started: `kvbm` is started here; for lmcache and pegaflow name commands by
--lmcache-daemon and --pegaflow-daemon, or start them yourself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from daemon import Node

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


def transfer_config(mode: str, socket: str, host_bytes: int, lmcache_port: int) -> dict[str, Any] | None:
    ours = {
        "kv_connector": "KvbmConnector",
        "kv_connector_module_path": "kvbm_connector.vllm",
        "kv_connector_extra_config": {
            "kvbm.endpoint": f"unix:{socket}",
            "kvbm.cross_layer": str(mode == "kvbm").lower(),
        },
    }
    configs: dict[str, dict[str, Any] | None] = {
        "none": None,
        "kvbm": ours,
        "kvbm-per-layer": ours,
        "native": {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {"cpu_bytes_to_use": host_bytes},
        },
        "lmcache": {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": lmcache_port,
                "lmcache.mp.mq_timeout": 60.0,
            },
        },
        "pegaflow": {"kv_connector": "PegaKVConnector", "kv_connector_module_path": "pegaflow.connector"},
    }
    config = configs[mode]
    return None if config is None else {**config, "kv_role": "kv_both"}


def one(options: argparse.Namespace) -> None:
    """One engine, in this process."""
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        PYTHONHASHSEED="0",
        LMCACHE_TRACK_USAGE="false",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    )
    import torch
    from vllm import LLM, SamplingParams

    lengths = [int(length) for length in options.lengths.split(",")]
    shape: dict[str, Any] = {"load_format": "dummy"} if options.model is None else {}
    folder = Path(tempfile.mkdtemp())
    if options.model is None:
        (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    config = transfer_config(options.one, options.socket, int(options.host_gb * 1e9), options.lmcache_port)
    extra = {} if config is None else {"kv_transfer_config": config, "disable_hybrid_kv_cache_manager": True}
    begun = time.monotonic()
    llm = LLM(
        str(options.model or folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(lengths) + 64,
        dtype="bfloat16",
        gpu_memory_utilization=0.6,
        max_num_seqs=8,
        **shape,
        **extra,
    )
    result: dict[str, Any] = {"mode": options.one, "ready_s": time.monotonic() - begun, "prompts": []}
    if options.one == "none":
        host, device = (
            torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True),
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        )
        rates = []
        for _ in range(5):
            torch.cuda.synchronize()
            begun = time.monotonic()
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            rates.append((1 << 30) / (time.monotonic() - begun))
        result["copy_bytes_per_s"] = max(rates)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)

    def first_token(prompt: list[int]) -> tuple[float, int, int]:
        begun = time.monotonic()
        made = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        return (time.monotonic() - begun) * 1e3, made.num_cached_tokens or 0, made.outputs[0].token_ids[0]

    rng = random.Random(7)

    def prompt_of(length: int) -> list[int]:
        return [rng.randrange(1000, 120000) for _ in range(length)]

    # Memory is taken, and made known to the GPU, as it is first needed: all connectors begin with theirs in use.
    for _ in range(options.warm_up):
        first_token(prompt_of(max(lengths)))
    time.sleep(options.settle)
    for length in lengths:
        first_token(prompt_of(length))
        for _ in range(options.prompts):
            prompt = prompt_of(length)
            # At once: while what was computed may still be being saved.
            cold, at_once = first_token(prompt), first_token(prompt)
            time.sleep(options.settle)
            own = first_token(prompt)
            emptied = is_emptied(llm)
            host = first_token(prompt) if config else None
            result["prompts"].append(
                {
                    "length": length,
                    "cold": cold[0],
                    "at_once": at_once[0],
                    "own": own[0],
                    "host": host and host[0],
                    "cached": host and host[1],
                    "emptied": emptied,
                    "same": len({part[2] for part in (cold, at_once, own, host) if part}) == 1,
                }
            )
    print("RESULT " + json.dumps(result), flush=True)


def is_emptied(llm: Any) -> bool:
    """Whether the engine's own cache is empty now. It keeps all of it while a connector holds any block."""
    until = time.monotonic() + 3
    while not llm.reset_prefix_cache():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def started(command: str | None) -> subprocess.Popen[bytes] | None:
    return (
        None
        if command is None
        else subprocess.Popen(shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    )


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    daemons = [started(options.lmcache_daemon), started(options.pegaflow_daemon)]
    with tempfile.TemporaryDirectory() as name:
        node = (
            Node(options.kvbm, Path(name), "--cpu-cache-gb", str(options.host_gb), *options.daemon.split(), held=False)
            if options.kvbm
            else None
        )
        if node:
            node.start()
        try:
            for at in range(options.starts):
                for mode in options.modes.split(","):
                    socket = str(node.socket) if node else ""
                    done = subprocess.run(
                        [sys.executable, __file__, *sys.argv[1:], "--one", mode, "--socket", socket],
                        capture_output=True,
                        text=True,
                    )
                    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                    if lines:
                        results.append(json.loads(lines[-1][len("RESULT ") :]))
                        print(lines[-1], flush=True)
                    else:
                        print(
                            f"{mode}, start {at}: no result\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", flush=True
                        )
        finally:
            if node:
                print((Path(name) / "daemon.log").read_text()[-3000:])
                node.close()
            for daemon in daemons:
                if daemon:
                    daemon.kill()
    return results


def median_of(prompts: list[dict[str, Any]], what: str) -> float:
    return statistics.median(one[what] for one in prompts)


def table(results: list[dict[str, Any]], lengths: list[int], modes: list[str]) -> str:
    rate = max((result["copy_bytes_per_s"] for result in results if "copy_bytes_per_s" in result), default=None)
    lines = [
        "| connector | tokens | cold ms | own hit at once ms | own hit ms | host hit ms, median (least to most) "
        "| of the floor | all found, same token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in lengths:
        rows = {
            mode: [
                one
                for result in results
                if result["mode"] == mode
                for one in result["prompts"]
                if one["length"] == length
            ]
            for mode in modes
        }
        floor = None
        if rate and rows.get("none"):
            floor = median_of(rows["none"], "own") + length * KV_BYTES_PER_TOKEN / rate * 1e3
            lines.append(f"| floor | {length} | | | | {floor:.1f} ({rate / 1e9:.1f} GB/s) | | |")
        for mode in modes:
            if not rows[mode]:
                continue
            host = [one["host"] for one in rows[mode] if one["host"] is not None]
            # Else what is called a host hit was one in the engine's own cache.
            found = all(
                one["emptied"] and one["same"] and (one["host"] is None or one["cached"] >= length - 64)
                for one in rows[mode]
            )
            middle = statistics.median(host) if host else None
            lines.append(
                f"| {mode} | {length} | {median_of(rows[mode], 'cold'):.1f} | {median_of(rows[mode], 'at_once'):.1f} "
                f"| {median_of(rows[mode], 'own'):.1f} "
                f"| {f'{middle:.1f} ({min(host):.1f} to {max(host):.1f})' if middle else ''} "
                f"| {f'{middle / floor:.3f}' if middle and floor else ''} | {found} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="none,native,kvbm,kvbm-per-layer")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument(
        "--warm-up", type=int, default=10, help="prompts of the greatest length before anything is measured"
    )
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--settle", type=float, default=2.5, help="seconds between a prompt and its host hit")
    parser.add_argument("--model", type=Path, help="instead of dummy weights")
    parser.add_argument("--kvbm", type=Path, help="the binary")
    parser.add_argument("--host-gb", type=float, default=24, help="host memory, of ours and of native offloading")
    parser.add_argument(
        "--daemon", default="--eviction-policy lru", help="more settings of our daemon; the others keep what is newest"
    )
    parser.add_argument("--lmcache-daemon")
    parser.add_argument("--lmcache-port", type=int, default=15555, help="at which that daemon listens")
    parser.add_argument("--pegaflow-daemon")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--socket", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    results = run_all(options)
    print(table(results, [int(length) for length in options.lengths.split(",")], options.modes.split(",")))


if __name__ == "__main__":
    main()
