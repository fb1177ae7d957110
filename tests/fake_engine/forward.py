"""One forward pass: each layer reads the KV of everything before, compares it, and writes what the pass computes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .callbacks import Callbacks
from .config import EngineConfig
from .content import VOCABULARY, Words
from .faults import WRONG_BYTES
from .manager import ConnectorManager
from .memory import Check, KvMemory
from .request import EngineRequest, State
from .schedule import Batch


@dataclass
class Pass:
    """What was launched: each request with the number of tokens that the pass gave it."""

    entries: list[tuple[EngineRequest, int]] = field(default_factory=list)
    checks: list[tuple[str, Check]] = field(default_factory=list)


@dataclass
class _Work:
    request: EngineRequest
    start: int
    numbers: Words
    """Of the positions that are written."""
    before: Words


class Forward:
    def __init__(
        self, config: EngineConfig, memory: KvMemory, manager: ConnectorManager, callbacks: Callbacks
    ) -> None:
        self.config = config
        self.memory = memory
        self.manager = manager
        self.callbacks = callbacks

    def run(self, batch: Batch, stream: Any, calls: bool = True) -> Pass:
        """On the execution stream. `calls` False: warm-up, no callback."""
        launched = Pass()
        drafts = {request.request_id: self._drafts(request) for request in batch.generation}
        work = [self._context_work(request) for request in batch.context]
        work += [self._generation_work(request, drafts[request.request_id]) for request in batch.generation]
        hooks = not (self.config.graphs and not batch.context)
        worker = self.manager.worker
        for layer in range(self.memory.geometry.layer_count):
            if hooks:
                self.callbacks.call_in_forward("wait_for_layer_load", worker.wait_for_layer_load, layer, stream)
            self._layer(layer, work, launched)
            if hooks:
                self.callbacks.call_in_forward("save_kv_layer", worker.save_kv_layer, layer, stream)
        if self.manager.forward_callable is not None:
            self.callbacks.call_in_forward("forward_callable", self.manager.forward_callable)
        for request in batch.context:
            launched.entries.append((request, self._advance_context(request)))
        for request in batch.generation:
            launched.entries.append((request, self._advance_generation(request, drafts[request.request_id])))
        return launched

    def _context_work(self, request: EngineRequest) -> _Work:
        start, end = request.position, request.position + request.chunk
        request.digests.extend(request.device_tokens, end)
        return _Work(request, start, request.digests.numbers(start, end), request.digests.numbers(0, start))

    def _generation_work(self, request: EngineRequest, drafts: list[int]) -> _Work:
        end = len(request.device_tokens)
        request.digests.extend(request.device_tokens, end)
        numbers = request.digests.numbers(end - 1, end)
        if drafts:
            import numpy as np

            numbers = np.concatenate([numbers, request.digests.branch(request.device_tokens, drafts)])
        return _Work(request, end - 1, numbers, request.digests.numbers(0, end - 1))

    def _layer(self, layer: int, work: list[_Work], launched: Pass) -> None:
        for group, shape in enumerate(self.memory.geometry.groups):
            if layer not in shape.layers:
                continue
            for item in work:
                pages = item.request.pages[group]
                first = 0 if shape.window is None else max(0, item.start + 1 - shape.window)
                if self.config.verify:
                    self._check(self.memory.read(group, layer, pages, first, item.before[first:]), item, launched)
                self.memory.write(group, layer, pages, item.start, item.numbers)

    def _check(self, check: Check | None, item: _Work, launched: Pass) -> None:
        if check is None:
            return
        told = (
            f"request {item.request.request_id} at position {item.start}"
            f" (local {item.request.local_match}, from the connector {item.request.matched_by_connector})"
        )
        launched.checks.append((told, check))

    def resolve(self, launched: Pass) -> None:
        """Says what the pass read wrong. On a GPU this waits for the pass."""
        for told, check in launched.checks:
            wrong = check()
            if wrong is not None:
                self.callbacks.violation(WRONG_BYTES, f"{told}: {wrong}")
        launched.checks.clear()

    def _drafts(self, request: EngineRequest) -> list[int]:
        """Draft tokens, some of them what the model will say."""
        guess = random.Random(f"{self.config.seed} {request.request_id} {len(request.device_tokens)}")
        tokens = list(request.device_tokens)
        drafts = []
        for _ in range(request.spec.draft_tokens):
            right = guess.random() < 0.6
            drafts.append(_say(request, tokens) if right else guess.randrange(VOCABULARY))
            tokens.append(drafts[-1])
        return drafts

    def _advance_context(self, request: EngineRequest) -> int:
        request.position += request.chunk
        request.kv_len = request.position
        request.first_chunk = False
        if request.position < request.prompt_len:
            return 0
        request.device_tokens.append(request.digests.next_token(request.prompt_len))
        request.state = State.GENERATION
        return 1

    def _advance_generation(self, request: EngineRequest, drafts: list[int]) -> int:
        tokens = request.device_tokens
        before = len(tokens)
        for draft in drafts:
            if draft != _say(request, tokens):
                break
            tokens.append(draft)
        request.kv_len = len(tokens)
        tokens.append(_say(request, tokens))
        return len(tokens) - before


def _say(request: EngineRequest, tokens: list[int]) -> int:
    """What the model says after `tokens`; those behind the request's own are a branch."""
    own = len(request.device_tokens)
    if len(tokens) == own:
        request.digests.extend(tokens, own)
        return request.digests.next_token(own)
    return int(request.digests.branch(tokens[:own], tokens[own:])[-1]) % VOCABULARY
