"""The connector's figures in the engine's own log and metrics."""

from __future__ import annotations

from typing import Any

from ._native import Engine
from ._vllm_api import PromMetrics, Stats

# Totals that the engine shows, and what they say.
FIGURES = {
    "queries": "Prefixes asked for.",
    "promised_tokens": "Tokens found in the cache beyond the engine's own.",
    "loaded_blocks": "Blocks brought from host memory.",
    "layered_loads": "Loads whose requests went on before all layers were there.",
    "saved_blocks": "Blocks copied to host memory.",
    "stale_blocks": "Copies of blocks that were used anew meanwhile; they did not count.",
    "dropped_saves": "Saves that nobody took.",
    "broken_promises": "Loads that failed, so that their tokens were computed.",
    "lookup_timeouts": "Lookups that the daemon did not answer in time.",
    "lookups_on_stream": "Lookups that went the long way, through the session's stream.",
    "lookups_skipped": "Lookups that were not asked because the daemon was away or slow.",
    "disk_waits": "Requests that waited for blocks from disk.",
    "segments_kept": "Host segments that were mapped already when a session brought them.",
    "attaches": "Times a session with the daemon was opened.",
}


class KvbmStats(Stats):  # type: ignore[misc]
    """What was counted since the last time."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: Any) -> KvbmStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class Counted:
    """Totals of one process, as differences."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before: dict[str, int] = {}

    def since(self) -> KvbmStats | None:
        figures = self._engine.figures()
        now = {name: count for name in FIGURES if isinstance(count := figures.get(name), int)}
        if now == self._before:
            return None
        counted = {name: count - self._before.get(name, 0) for name, count in now.items()}
        self._before = now
        return KvbmStats(data={name: count for name, count in counted.items() if count})


class KvbmPromMetrics(PromMetrics):  # type: ignore[misc]
    """Counters `vllm:kvbm_...` beside the engine's own."""

    def __init__(self, config: Any, metric_types: Any, labelnames: list[str], labels: dict[int, list[object]]) -> None:
        super().__init__(config, metric_types, labelnames, labels)
        self._counters = {}
        for name, said in FIGURES.items():
            counter = self._counter_cls(name=f"vllm:kvbm_{name}", documentation=said, labelnames=labelnames)
            self._counters[name] = {engine: counter.labels(*values) for engine, values in labels.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in self._counters and count:
                self._counters[name][engine_idx].inc(count)
