"""How long callbacks hold the engine's thread, at many concurrent requests: `python -m fake_engine load`."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from .engine import EngineGone
from .scenarios import Context, Options

TOKENS_PER_BLOCK = 32
P99_LIMIT_S = {"get_finished": 50e-6}
"""Each other callback has DEFAULT_P99_S."""
DEFAULT_P99_S = 1e-3
ATTACHING_S = 0.5
"""How long a connector may take to reach its cache before requests come."""
ON_THE_THREAD = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "bind_connector_meta",
    "start_load_kv", "wait_for_layer_load", "save_kv_layer", "forward_callable", "wait_for_save", "request_finished",
    "get_finished",
)


@dataclass(frozen=True)
class Load:
    requests: int = 64
    long_requests: int = 4
    long_blocks: int = 1024
    short_blocks: int = 24
    decode_tokens: int = 64
    rounds: int = 3


def load(options: Options, size: Load) -> tuple[dict[str, list[float]], list[Any], int]:
    """Seconds per callback, what was wrong, and the tokens that the cache gave."""
    ctx = Context(options, "load", 0)
    prompts = [ctx.tokens(size.long_blocks * TOKENS_PER_BLOCK + 1) for _ in range(size.long_requests)]
    prompts += [ctx.tokens(size.short_blocks * TOKENS_PER_BLOCK + 9) for _ in range(size.requests - len(prompts))]
    blocks = sum(len(prompt) // TOKENS_PER_BLOCK + size.decode_tokens // TOKENS_PER_BLOCK + 2 for prompt in prompts)
    setup: dict[str, Any] = {
        "tokens_per_block": TOKENS_PER_BLOCK, "pages": blocks + 64, "max_num_tokens": 1 << 22, "patience_s": 300.0,
        "free_order": "fifo",
    }
    seconds: dict[str, list[float]] = {}
    offered = 0
    try:
        # A daemon that has just started is still getting its memory; what is timed is not its start.
        first = ctx.engine(tokens_per_block=TOKENS_PER_BLOCK, pages=64)
        ctx.warm(first, ctx.tokens(8 * TOKENS_PER_BLOCK))
        first.leave()
        for _ in range(size.rounds):
            # Each round is a new engine, so that it finds with the connector what the one before computed.
            engine = ctx.engine(**setup)
            engine.idle(ATTACHING_S)
            random.Random(0).shuffle(prompts)
            ids = [engine.submit(prompt, size.decode_tokens) for prompt in prompts]
            engine.run(*ids)
            offered += sum(engine.status(id_).offered for id_ in ids)
            time.sleep(1.0)
            engine.leave()
            for name, values in engine.seconds.items():
                seconds.setdefault(name, []).extend(values)
    except EngineGone:
        pass
    return seconds, ctx.finish(), offered


def over_limit(seconds: dict[str, list[float]]) -> list[str]:
    """Callbacks whose 99th percentile is over its limit."""
    found = []
    for name in ON_THE_THREAD:
        values = sorted(seconds.get(name, []))
        limit = P99_LIMIT_S.get(name, DEFAULT_P99_S)
        if values and values[min(len(values) - 1, int(0.99 * len(values)))] > limit:
            found.append(name)
    return found
