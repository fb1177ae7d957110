"""The call counts and reports that TensorRT-LLM's own connector tests pin, checked on this engine.

A recording connector writes down what it is called with; each check says which of the upstream tests it mirrors.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from .config import ConnectorNames, EngineConfig
from .engine import Engine
from .retention import Retention, TokenRange

BLOCK = 32
LAYERS = 3

_observed: ConnectorNames | None = None
"""The connector that is looked at; None: one that answers as it is told."""


class Record:
    """What a recording connector saw of one engine."""

    def __init__(self, offer: int = 0, load: bool = False, keep: bool = False, **changes: Any) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="golden", suffix=".jsonl")
        url = f"record:{self._file.name}?offer={offer}&async={int(load)}&keep={int(keep)}"
        names = ConnectorNames("fake_engine.connectors.recording", "Scheduler", "Worker", url)
        if _observed is not None:
            inner = _observed
            named = {"module": inner.module, "scheduler": inner.scheduler_class, "worker": inner.worker_class}
            query = urlencode(named | {"url": inner.server_url or ""})
            names = ConnectorNames(
                "fake_engine.connectors.through", "Scheduler", "Worker", f"record:{self._file.name}?{query}"
            )
        defaults: dict[str, Any] = {"tokens_per_block": BLOCK, "layers": LAYERS, "pages": 24, "verify": False}
        self.engine = Engine(EngineConfig(names, **(defaults | changes)))

    def run(self, *prompts: list[int], max_new_tokens: int = 8, **more: Any) -> list[dict[str, Any]]:
        ids = [self.engine.submit(prompt, max_new_tokens, **more) for prompt in prompts]
        self.engine.run(*ids)
        self.engine.leave()
        assert not self.engine.violations, self.engine.violations
        return [json.loads(line) for line in Path(self._file.name).read_text().splitlines()]


def calls(events: list[dict[str, Any]], call: str) -> list[dict[str, Any]]:
    return [event for event in events if event["call"] == call]


def reports(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The only request's report of each pass."""
    return [(event["new"] + event["cached"])[0] for event in calls(events, "meta") if event["new"] + event["cached"]]


def equal(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: {found}, not {wanted}")


_prompts = itertools.count(1)


def prompt(length: int) -> list[int]:
    """Where a connector answers for itself, each time another: nothing of it is found."""
    first = 100 if _observed is None else 1000 * next(_prompts)
    return list(range(first, first + length))


def simple(overlap: bool) -> None:
    events = Record(overlap=overlap).run(prompt(10))
    counts = {call: len(calls(events, call)) for call in ("register", "meta", "start_load", "wait_save", "query")}
    equal("calls", counts, {"register": 1, "meta": 8, "start_load": 8, "wait_save": 8, "query": 1})
    for hook in ("wait_layer", "save_layer"):
        equal(hook, [event["layer"] for event in calls(events, hook)], list(range(LAYERS)) * 8)
    equal("forward callable", len(calls(events, "forward")), 8)
    equal("get_finished", len(calls(events, "get_finished")), 8 + overlap)
    equal("blocks at allocation", [len(event["blocks"]) for event in calls(events, "alloc")], [1])
    equal("blocks at the end", [len(event["blocks"]) for event in calls(events, "finished")], [1])
    metas = calls(events, "meta")
    equal("new requests", [len(meta["new"]) for meta in metas], [1] + [0] * 7)
    tokens = [len(meta["cached"][0]["new_tokens"]) for meta in metas[1:]]
    equal("new tokens", tokens, [0 if overlap else 1] + [1] * 6)


def async_onboard(overlap: bool) -> None:
    events = Record(offer=16, load=True, overlap=overlap).run(prompt(40))
    polls = calls(events, "get_finished")
    equal("get_finished", len(polls), 8 + 1 + overlap)
    equal("ids of loads", [poll["loading"] for poll in polls], [[1]] + [[]] * (len(polls) - 1))
    equal("first position behind a parked load", reports(events)[0]["computed_position"], 16)


def async_save(overlap: bool) -> None:
    events = Record(keep=True, overlap=overlap).run(prompt(10))
    polls = calls(events, "get_finished")
    equal("ids of saves", [poll["saving"] for poll in polls], [[]] * (len(polls) - 1) + [[1]])


def scheduler_output(overlap: bool) -> None:
    events = Record(overlap=overlap).run(prompt(48), max_new_tokens=32)
    first, *rest = reports(events)
    found = (len(first["new_tokens"]), len(first["new_block_ids"]), first["computed_position"])
    equal("first report", (*found, first["num_scheduled_tokens"]), (48, 2, 0, 48))
    for number, report in enumerate(rest):
        equal("new tokens", len(report["new_tokens"]), 0 if overlap and number == 0 else 1)
        boundary = (report["computed_position"] + overlap) % BLOCK == 0
        equal("new blocks", len(report["new_block_ids"]), int(boundary))
        equal("scheduled", report["num_scheduled_tokens"], 1)
    equal("blocks at the end", [len(event["blocks"]) for event in calls(events, "finished")], [3])
    shown = reports(Record(offer=8, overlap=overlap).run(prompt(48)))[0]
    equal("position of a synchronous load", shown["computed_position"], 0)


def chunked(overlap: bool) -> None:
    events = Record(overlap=overlap, chunk_tokens=128).run(prompt(256), max_new_tokens=4)
    first, second, *rest = reports(events)
    equal("tokens", (len(first["new_tokens"]), len(first["new_block_ids"])), (256, 8))
    equal("chunks", (first["num_scheduled_tokens"], second["num_scheduled_tokens"]), (128, 128))
    second_report = (second["computed_position"], second["new_tokens"], second["new_block_ids"])
    equal("second chunk", second_report, (128, [], []))
    equal("decode", [report["num_scheduled_tokens"] for report in rest], [1] * len(rest))


def context_only(overlap: bool) -> None:
    for keep in (False, True):
        events = Record(keep=keep, overlap=overlap).run(prompt(48), context_only=True)
        equal("metadata", [len(report["new_tokens"]) for report in reports(events)], [48])
        equal("ends", len(calls(events, "finished")), 1)


def multi_request(overlap: bool) -> None:
    for pages in (4, 5):
        record = Record(keep=True, overlap=overlap, pages=pages)
        prompts = [[number * 1000 + token for token in range(48)] for number in range(3)]
        equal("ends", len(calls(record.run(*prompts, max_new_tokens=6), "finished")), 3)


def matched_tokens(overlap: bool) -> None:
    for offer in (0, 32):
        events = Record(offer=offer, overlap=overlap).run(prompt(48))
        equal("matched by the connector", [event["matched"] for event in calls(events, "alloc")], [offer])


def priorities(overlap: bool) -> None:
    retention = Retention((TokenRange(0, 32, 80), TokenRange(32, None, 10)))
    shown = reports(Record(overlap=overlap).run(prompt(48), retention=retention))[0]
    equal("priorities", shown["priorities"], [80, 10])
    equal("no priorities", reports(Record(overlap=overlap).run(prompt(48)))[0]["priorities"], None)


def refusals(overlap: bool) -> None:
    for option, value in (
        ("kv_cache_config.host_cache_size", 1), ("max_beam_width", 2), ("enable_attention_dp", True)
    ):
        engine = Record(overlap=overlap, model_options={option: value}).engine
        if engine.refused is None or not engine.refused.startswith("NotImplementedError"):
            raise AssertionError(f"{option}: {engine.refused}")


def prefix_is_asked_once(overlap: bool) -> None:
    for api in ("L1", "L2"):
        events = Record(offer=64, api=api, overlap=overlap).run(prompt(256))
        equal("queries", [event["local"] for event in calls(events, "query")], [0])
        first = reports(events)[0]
        equal("first pass", (first["computed_position"], first["num_scheduled_tokens"]), (0, 192))


def prefix_under_chunks(overlap: bool) -> None:
    for api in ("L1", "L2"):
        for offer in (64, 192):
            events = Record(offer=offer, api=api, overlap=overlap, chunk_tokens=128).run(prompt(256))
            equal("queries", len(calls(events, "query")), 1)
            context = [r for r in reports(events) if r["num_scheduled_tokens"] > 1]
            sizes = [report["num_scheduled_tokens"] for report in context]
            equal("tokens computed", (sum(sizes), max(sizes) <= 128), (256 - offer, True))
            position = offer
            for number, report in enumerate(context):
                equal("position", report["computed_position"], 0 if number == 0 else position)
                position += report["num_scheduled_tokens"]


def windows(overlap: bool) -> None:
    record = Record(offer=64, api="L2", window=40, overlap=overlap, chunk_tokens=64)
    events = record.run(prompt(256), max_new_tokens=20)
    alloc = calls(events, "alloc_by_group")[0]["groups"]
    # Behind 64 tokens a window of 40 has left the blocks before (64 + 1 - 40) / 32.
    equal("pages out of the window", [page < 0 for page in alloc[1]], [False] * 4)
    equal("flat list", reports(events)[0]["new_block_ids"], [])
    ended = calls(events, "finished_by_group")[0]["groups"]
    history = 256 + 19
    equal("pages at the end", [page < 0 for page in ended[1]][:7], [True] * ((history + 1 - 40) // BLOCK))
    if any(page < 0 for page in ended[0]):
        raise AssertionError("a group without a window lost pages")


CHECKS: list[Callable[[bool], None]] = [
    simple, async_onboard, async_save, scheduler_output, chunked, context_only, multi_request, matched_tokens,
    priorities, refusals, prefix_is_asked_once, prefix_under_chunks, windows,
]


def cold(overlap: bool) -> None:
    """What does not depend on what a connector finds, of the checks above."""
    simple(overlap)
    chunked(overlap)
    first = reports(Record(overlap=overlap).run(prompt(48), max_new_tokens=32))[0]
    found = (len(first["new_tokens"]), len(first["new_block_ids"]), first["computed_position"])
    equal("first report", (*found, first["num_scheduled_tokens"]), (48, 2, 0, 48))
    priorities(overlap)


def found_again(overlap: bool) -> None:
    """A prompt that another engine computed: asked once, parked once, and computed behind what was found."""
    tokens = [7_000_000 + overlap, *prompt(3 * BLOCK)]
    Record(overlap=overlap).run(tokens)
    deadline = time.monotonic() + 10.0
    while True:
        events = Record(overlap=overlap).run(tokens)
        matched = [event["matched"] for event in calls(events, "alloc")]
        if matched == [3 * BLOCK] or time.monotonic() > deadline:
            break
    equal("matched by the connector", matched, [3 * BLOCK])
    equal("queries", [event["local"] for event in calls(events, "query")], [0])
    polls = calls(events, "get_finished")
    equal("ids of loads", [poll["loading"] for poll in polls if poll["loading"]], [[1]])
    first = reports(events)[0]
    equal("first pass", (first["computed_position"], first["num_scheduled_tokens"]), (3 * BLOCK, 1))
    equal("ends", len(calls(events, "finished")), 1)


def golden_of(connector: ConnectorNames) -> int:
    """The same counts with a connector that answers for itself; the number of checks that failed."""
    global _observed
    _observed = connector
    try:
        return _run([cold, found_again])
    finally:
        _observed = None


def golden() -> int:
    """The number of checks that failed."""
    return _run(CHECKS)


def _run(checks: list[Callable[[bool], None]]) -> int:
    failed = 0
    for check in checks:
        for overlap in (False, True):
            try:
                check(overlap)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {check.__name__}{' with overlap' if overlap else ''}: {error}")
    print(f"{2 * len(checks) - failed} of {2 * len(checks)} golden checks passed")
    return failed
