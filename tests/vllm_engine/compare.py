"""Time to first token of one vLLM engine with several connectors in turn, on a machine with a GPU.

    compare.py --modes none,native,kvbm,kvbm-per-layer,lmcache,pegaflow --kvbm target/ci/kvbm --starts 2

For each prompt: cold, then with the engine's own cache, then with that cache emptied, so that the KV comes from host
memory. The floor is what no connector can be faster than: a hit in the engine's own cache, no connector, and the bytes
of the KV at the rate at which this machine copies pinned memory to the GPU. `connectors.py` starts the engines.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import connectors


def one(options: argparse.Namespace) -> None:
    """One engine, in this process."""
    lengths = [int(length) for length in options.lengths.split(",")]
    begun = time.monotonic()
    llm = connectors.make_llm(options, max(lengths) + 64, max_num_seqs=8)
    result: dict[str, Any] = {"mode": options.one, "ready_s": time.monotonic() - begun, "prompts": []}
    if options.one == "none":
        result["copy_bytes_per_s"] = copy_rate()
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)

    def first_token(prompt: list[int]) -> tuple[float, int, int]:
        begun = time.monotonic()
        made = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        return (time.monotonic() - begun) * 1e3, made.num_cached_tokens or 0, made.outputs[0].token_ids[0]

    rng = random.Random(7)
    most = min(120000, llm.llm_engine.model_config.get_vocab_size())

    def prompt_of(length: int) -> list[int]:
        return [rng.randrange(most // 100, most) for _ in range(length)]

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
            host = first_token(prompt) if options.one != "none" else None
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
    connectors.tell(options, result)


def copy_rate() -> float | None:
    """Bytes per second from pinned memory to the GPU; none without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.monotonic()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        rates.append((1 << 30) / (time.monotonic() - begun))
    return max(rates)


def is_emptied(llm: Any) -> bool:
    """Whether the engine's own cache is empty now. It keeps all of it while a connector holds any block."""
    until = time.monotonic() + 3
    while not llm.reset_prefix_cache():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def median_of(prompts: list[dict[str, Any]], what: str) -> float:
    return statistics.median(one[what] for one in prompts)


def table(results: list[dict[str, Any]], lengths: list[int], modes: list[str]) -> str:
    rate = max((result["copy_bytes_per_s"] for result in results if result.get("copy_bytes_per_s")), default=None)
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
            floor = median_of(rows["none"], "own") + length * connectors.KV_BYTES_PER_TOKEN / rate * 1e3
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
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{connectors.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    connectors.add_arguments(parser, "none,native,kvbm,kvbm-per-layer")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument(
        "--warm-up", type=int, default=10, help="prompts of the greatest length before anything is measured"
    )
    parser.add_argument("--settle", type=float, default=2.5, help="seconds between a prompt and its host hit")
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    results = connectors.run_all(options)
    print(table(results, [int(length) for length in options.lengths.split(",")], options.modes.split(",")))


if __name__ == "__main__":
    main()
