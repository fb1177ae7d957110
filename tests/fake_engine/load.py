"""How long callbacks hold the engine's thread, at many concurrent requests: `python -m fake_engine load`.

Two times are told of each callback: the whole, and the connector's, which is the whole without what the engine itself
does when the connector asks it. That is `get_tokens`, which makes a new list of new numbers from a C++ vector: no
connector can do without it, and none can make it faster. The limits are for the connector's time.

Two set-ups are timed. In `chunked` a pass has 8,192 tokens, TensorRT-LLM's default, and longer prompts are computed in
chunks; without them it refuses such prompts. In `one-pass` all prompts are computed, and told to the connector, in a
single pass: no engine has so large passes, so nothing is worse.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

from .engine import EngineGone
from .faults import Violation
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
SETUPS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_tokens": 8192, "chunk_tokens": 8192},
    "one-pass": {"max_num_tokens": 1 << 22},
}


@dataclass(frozen=True)
class Load:
    requests: int = 64
    long_requests: int = 4
    long_blocks: int = 1024
    short_blocks: int = 24
    decode_tokens: int = 64
    rounds: int = 3


@dataclass
class Timed:
    """Seconds per callback, what was wrong, and the tokens that the cache gave."""

    whole: dict[str, list[float]] = field(default_factory=dict)
    connector: dict[str, list[float]] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    offered: int = 0

    def over_limit(self) -> list[str]:
        """Callbacks of whose connector's time the 99th percentile is over its limit."""
        found = []
        for name in ON_THE_THREAD:
            values = self.connector.get(name, [])
            if values and percentile(values, 0.99) > P99_LIMIT_S.get(name, DEFAULT_P99_S):
                found.append(name)
        return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def load(options: Options, size: Load, setup: str) -> Timed:
    ctx = Context(options, f"load {setup}", 0)
    prompts = [ctx.tokens(size.long_blocks * TOKENS_PER_BLOCK + 1) for _ in range(size.long_requests)]
    prompts += [ctx.tokens(size.short_blocks * TOKENS_PER_BLOCK + 9) for _ in range(size.requests - len(prompts))]
    blocks = sum(len(prompt) // TOKENS_PER_BLOCK + size.decode_tokens // TOKENS_PER_BLOCK + 2 for prompt in prompts)
    common: dict[str, Any] = {
        "tokens_per_block": TOKENS_PER_BLOCK, "pages": blocks + 64, "patience_s": 300.0, "free_order": "fifo",
    }
    timed = Timed()
    try:
        # A daemon that has just started is still getting its memory; what is timed is not its start.
        first = ctx.engine(tokens_per_block=TOKENS_PER_BLOCK, pages=64)
        ctx.warm(first, ctx.tokens(8 * TOKENS_PER_BLOCK))
        first.leave()
        for _ in range(size.rounds):
            # Each round is a new engine, so that it finds with the connector what the one before computed.
            engine = ctx.engine(**common, **SETUPS[setup])
            engine.idle(ATTACHING_S)
            random.Random(0).shuffle(prompts)
            ids = [engine.submit(prompt, size.decode_tokens) for prompt in prompts]
            engine.run(*ids)
            timed.offered += sum(engine.status(id_).offered for id_ in ids)
            time.sleep(1.0)
            engine.leave()
            for name, values in engine.seconds.items():
                timed.whole.setdefault(name, []).extend(values)
            for name, values in engine.connector_seconds.items():
                timed.connector.setdefault(name, []).extend(values)
    except EngineGone:
        pass
    timed.violations = ctx.finish()
    return timed
