"""Blocks for the next pass: prefixes are matched, pages allocated, and the connector is asked and told."""

from __future__ import annotations

import random

from .blocks import BlockManager, Match, first_in_window
from .callbacks import Callbacks
from .config import EngineConfig
from .faults import STRAY_WRITE
from .manager import ConnectorManager
from .memory import KvMemory
from .request import EngineRequest, State
from .schedule import Batch, Scheduler


class Preparation:
    def __init__(
        self, config: EngineConfig, memory: KvMemory, manager: ConnectorManager, callbacks: Callbacks,
        blocks: BlockManager, scheduler: Scheduler,
    ) -> None:
        self.config = config
        self.memory = memory
        self.manager = manager
        self.callbacks = callbacks
        self.blocks = blocks
        self.scheduler = scheduler
        self._fresh: list[tuple[int, int]] = []
        self._late: set[tuple[int, int]] = set()
        self._free_sums: dict[tuple[int, int], int] = {}
        blocks.on_free = self._note_free
        for group in range(len(config.geometry().groups)):
            for page in range(config.pages):
                self._note_free(group, page)

    def run(self, batch: Batch) -> None:
        self._fresh.clear()
        if self.config.max_utilization:
            self._make_room(batch)
        started = [r for r in batch.context if r.first_chunk and r.request_id not in self.manager.loaded_ok]
        for request in started:
            self._start(request)
        for request in started:
            self.manager.allocated(request)
        for request in batch.context:
            if request not in started:
                self._grow(request, request.position, request.position + request.chunk)
        for request in batch.generation:
            written = len(request.device_tokens) + request.spec.draft_tokens
            self._grow(request, request.kv_len, written)

    def _start(self, request: EngineRequest) -> None:
        """A request gets its blocks; the connector is asked once per allocation."""
        reuse = self.config.block_reuse
        match = self.blocks.match(request, self.config.partial_reuse) if reuse else Match([])
        self.blocks.start(request, match)
        local = len(match.nodes) * self.config.tokens_per_block
        if match.partial is not None:
            local += match.partial_tokens
            source = match.partial
            if source.users == 0 and not source.children:
                self.blocks.take_over(request, source)
            else:
                source.users += 1
                page = self._page(request, 0)
                source.users -= 1
                request.pages[0].append(page)
                self._fresh.remove((0, page))
                self.memory.copy(0, source.pages[0], page)
        request.local_match, request.position, request.kv_len = local, local, local
        if self.config.api == "L1":
            self._grow(request, local, request.prompt_len)
        if reuse or self.config.api == "L2":
            self._ask(request, local)
        request.chunk = self._chunk_behind(request)
        if self.config.api == "L2":
            self._grow(request, request.position, request.position + request.chunk)
        self._spare_load_targets(request)

    def _ask(self, request: EngineRequest, local: int) -> None:
        count, request.loads_asynchronously = self.manager.query(request, local)
        request.offered = count
        if count and self.config.short_commit:
            choice = random.Random(f"{self.config.seed} commit {request.request_id}")
            if choice.random() < 0.5:
                count = choice.randrange(count // self.config.tokens_per_block + 1) * self.config.tokens_per_block
        self.manager.commit(request, count)
        request.position = request.kv_len = local + count

    def _chunk_behind(self, request: EngineRequest) -> int:
        """The chunk was chosen before the prefix was known: it moves behind it and is shortened."""
        if request.position + request.chunk < request.prompt_len:
            return self.scheduler.whole_blocks(request, request.position, request.chunk)
        return request.prompt_len - request.position

    def _spare_load_targets(self, request: EngineRequest) -> None:
        """Pages that the connector may be loading into are not poisoned: what lies there is wrong enough."""
        size = self.config.tokens_per_block
        end = request.local_match + request.offered
        for ordinal in range(request.local_match // size, -(-end // size)):
            for group, pages in enumerate(request.pages):
                if ordinal < len(pages) and (group, pages[ordinal]) in self._fresh:
                    self._fresh.remove((group, pages[ordinal]))

    def _grow(self, request: EngineRequest, history: int, tokens: int) -> None:
        """Pages for the first `tokens` tokens; those that a window has left behind go."""
        size = self.config.tokens_per_block
        for group, shape in enumerate(self.memory.geometry.groups):
            first = first_in_window(history, shape.window, size)
            pages = request.pages[group]
            for ordinal in range(min(first, len(pages))):
                if pages[ordinal] >= 0:
                    self.blocks.give_back(request, group, pages[ordinal])
                    pages[ordinal] = -1
            while len(pages) * size < tokens:
                pages.append(self._page(request, group) if len(pages) >= first else -1)

    def _page(self, request: EngineRequest, group: int) -> int:
        page = self.blocks.allocate(request, group)
        self._check_free(group, page)
        self._free_sums.pop((group, page), None)
        self._fresh.append((group, page))
        return page

    def _make_room(self, batch: Batch) -> None:
        """L2: the youngest requests are sent back until the others' next tokens have blocks."""
        size = self.config.tokens_per_block
        while True:
            needed = sum(
                max(0, -(-(len(r.device_tokens) + r.spec.draft_tokens) // size) - len(r.pages[0]))
                for r in batch.generation
            )
            needed += sum(-(-r.prompt_len // size) - len(r.pages[0] if r.pages else []) for r in batch.context)
            if needed <= self.blocks.blocks_available():
                return
            victim = self.scheduler.active[-1] if self.scheduler.active else None
            assert victim is not None, "one request alone does not fit"
            if victim.state == State.PARKED:
                others = [r for r in self.scheduler.active if r.state != State.PARKED]
                victim = others[-1]
            self._send_back(victim, batch)

    def _send_back(self, request: EngineRequest, batch: Batch) -> None:
        if request.pages:
            self.blocks.release(request, 0)
            self.manager.forget(request.request_id)
        request.state = State.WAITING
        request.device_tokens = list(request.tokens)
        request.prompt_len = len(request.tokens)
        request.position = request.kv_len = 0
        request.first_chunk = True
        for requests in (batch.context, batch.generation, self.scheduler.active):
            if request in requests:
                requests.remove(request)
        self.scheduler.waiting.insert(0, request)

    # What lies in pages without an owner.

    def poison_fresh(self) -> None:
        """What new pages hold is wiped when their owner's pass is about to write them, not before."""
        for group in range(len(self.memory.geometry.groups)):
            self.memory.poison(group, [page for g, page in self._fresh if g == group])

    def expect_late_writes(self, freed: list[tuple[int, int]]) -> None:
        """Pages of a load that was cancelled: nobody told the connector, so until they are given on it may write."""
        self._late.update(freed)

    def _note_free(self, group: int, page: int) -> None:
        if not self.memory.on_cuda:
            self._free_sums[group, page] = self.memory.checksum(group, page)

    def _check_free(self, group: int, page: int) -> None:
        known = self._free_sums.get((group, page))
        if (group, page) not in self._late and known is not None and known != self.memory.checksum(group, page):
            self.callbacks.violation(STRAY_WRITE, f"page {page} of group {group} changed while it was free")
        self._late.discard((group, page))

    def audit_free(self) -> None:
        for group, free in enumerate(self.blocks.free):
            for page in free:
                self._check_free(group, page)
