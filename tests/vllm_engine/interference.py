"""What other requests' KV on its way costs those that decode, with several connectors in turn.

    interference.py --modes none,native,kvbm,lmcache,pegaflow --kvbm target/ci/kvbm --starts 2

`--batch` requests decode. Quiet windows and busy ones take turns. In a busy one prompts come beside them that host
memory has and the engine's own cache has not any more (there are more of them than it has room for), so that each is
onboarded; and short new ones, whose blocks are offloaded. Both come at set times, so that every connector has the
same to do; one that has not come to its end by then puts off the next (`--onboard-every-s 0`: always as soon as the
last one ended). An engine without a connector gets the short ones only: what they cost by being computed. Told are
the gaps between tokens of those that decode: TPOT; and how many cores the engine's processes use.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import connectors
from connectors import KV_BYTES_PER_TOKEN

BLOCK_TOKENS = 16


def one(options: argparse.Namespace) -> None:
    """One engine, in this process."""
    from vllm import SamplingParams

    windows, rng = options.windows, random.Random(7)
    # Room for those that decode and for two of the prompts that come and go.
    steps = int(windows * options.window_s / options.step_ms * 1e3)
    decode_tokens = min(steps, options.max_len - options.context)
    room = options.batch * (options.context + decode_tokens) + 2 * options.length + 8 * options.new_length
    blocks = room // BLOCK_TOKENS + options.batch + 64
    prompts = room // options.length + 3
    kv_bytes = (prompts * options.length + options.batch * (options.context + decode_tokens)) * KV_BYTES_PER_TOKEN
    if options.model is None and kv_bytes > options.host_gb * 1e9:
        sys.exit(f"the prompts' KV and that of those that decode are {kv_bytes / 1e9:.0f} GB: raise --host-gb")
    llm = connectors.make_llm(
        options,
        options.max_len,
        max_num_seqs=options.batch + 4,
        num_gpu_blocks_override=blocks,
        **({"block_size": BLOCK_TOKENS} if options.model is None else {}),
    )
    engine = llm.llm_engine
    most = min(120000, engine.model_config.get_vocab_size())
    names = iter(range(1 << 30))

    def prompt_of(length: int) -> list[int]:
        return [rng.randrange(most // 100, most) for _ in range(length)]

    def add(prompt: list[int], tokens: int) -> str:
        name = str(next(names))
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    decoding: dict[str, int] = {}

    def step() -> Any:
        outputs = engine.step()
        if any(made.finished and made.request_id in decoding for made in outputs):
            sys.exit("a request has decoded all its tokens: lower --step-ms, or raise --max-len")
        return outputs

    def until_done(*names: str | None) -> None:
        left = {name for name in names if name}
        while left:
            left -= {made.request_id for made in step() if made.finished}

    kept = [prompt_of(options.length) for _ in range(prompts)] if options.one != "none" else []
    for prompt in kept:
        until_done(add(prompt, 1))
    time.sleep(options.settle)
    decoding.update({add(prompt_of(options.context), decode_tokens): 0 for _ in range(options.batch)})
    while min(decoding.values()) < 8:
        for made in step():
            if made.request_id in decoding:
                decoding[made.request_id] = len(made.outputs[0].token_ids)
    gaps: list[list[float]] = []
    cores: list[float] = []
    found = asked = 0
    turn = 0
    for window in range(windows):
        busy, ends = window % 2 == 1, time.monotonic() + options.window_s
        onboarding = new = None
        next_new = next_onboarding = time.monotonic()
        last: dict[str, float] = {}
        gaps.append([])
        begun, used = time.monotonic(), cpu_seconds()
        while time.monotonic() < ends:
            if busy and kept and onboarding is None and time.monotonic() > next_onboarding:
                onboarding, turn = add(kept[turn % len(kept)], 1), turn + 1
                next_onboarding = max(next_onboarding + options.onboard_every_s, time.monotonic())
            if busy and new is None and time.monotonic() > next_new:
                new = add(prompt_of(options.new_length), 1)
                next_new = max(next_new + options.new_every_s, time.monotonic())
            outputs, now = step(), time.monotonic()
            for made in outputs:
                if made.request_id in decoding:
                    if made.request_id in last:
                        gaps[-1].append((now - last[made.request_id]) * 1e3)
                    last[made.request_id] = now
                elif made.finished and made.request_id == onboarding:
                    onboarding, asked = None, asked + options.length
                    found += made.num_cached_tokens or 0
                elif made.finished and made.request_id == new:
                    new = None
        cores.append((cpu_seconds() - used) / (time.monotonic() - begun))
        until_done(onboarding, new)
    engine.abort_request(list(decoding))
    connectors.tell(options, {"mode": options.one, "gaps": gaps, "cores": cores, "found": found, "asked": asked})


def cpu_seconds() -> float:
    """Of all processes of this one's session, which are the engine's."""
    session, ticks = str(os.getsid(0)), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended.
        if fields[3] == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def at(values: list[float], quantile: float) -> float:
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * quantile)]


def table(results: list[dict[str, Any]], modes: list[str]) -> str:
    lines = [
        "| connector | TPOT quiet p50, p99 ms | busy p50, p99 ms | cores quiet, busy | onboarded, of tokens asked |",
        "|---|---|---|---|---|",
    ]
    for mode in modes:
        of_mode = [result for result in results if result["mode"] == mode]
        if not of_mode:
            continue
        cells = []
        for busy in (0, 1):
            # The first window is one in which things settle.
            windows = [gaps for result in of_mode for gaps in result["gaps"][2 - busy :: 2] if gaps]
            cells.append(", ".join(f"{statistics.median(at(gaps, q) for gaps in windows):.2f}" for q in (0.5, 0.99)))
        used = ", ".join(
            f"{statistics.median(cores for result in of_mode for cores in result['cores'][2 - busy :: 2]):.2f}"
            for busy in (0, 1)
        )
        found, asked = (sum(result[name] for result in of_mode) for name in ("found", "asked"))
        share = f"{found / asked:.3f} of {asked}" if asked else ""
        lines.append(f"| {mode} | {cells[0]} | {cells[1]} | {used} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{connectors.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    connectors.add_arguments(parser, "none,native,kvbm")
    parser.set_defaults(host_gb=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt that decodes")
    parser.add_argument("--length", type=int, default=8192, help="tokens of prompts that are onboarded")
    parser.add_argument("--new-length", type=int, default=512, help="tokens of new prompts")
    parser.add_argument("--new-every-s", type=float, default=0.25)
    parser.add_argument("--onboard-every-s", type=float, default=0.2)
    parser.add_argument("--max-len", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=9, help="quiet, busy, quiet, ...")
    parser.add_argument("--window-s", type=float, default=3)
    parser.add_argument("--step-ms", type=float, default=4, help="the least that a step takes")
    parser.add_argument("--settle", type=float, default=2.5)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    results = connectors.run_all(options)
    print(table(results, options.modes.split(",")))


if __name__ == "__main__":
    main()
