"""Which requests compute in the next pass: admission by blocks, chunks of prompts, and pre-emption."""

from __future__ import annotations

from dataclasses import dataclass, field

from .blocks import BlockManager
from .config import EngineConfig
from .request import EngineRequest, State


@dataclass
class Batch:
    context: list[EngineRequest] = field(default_factory=list)
    generation: list[EngineRequest] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.context or self.generation)


class Scheduler:
    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: list[EngineRequest] = []
        self.active: list[EngineRequest] = []

    def next_batch(self) -> Batch:
        """Parked requests are active but in no batch."""
        batch = Batch()
        tokens = 0
        for request in self.active:
            if request.state == State.GENERATION:
                batch.generation.append(request)
                tokens += 1 + request.spec.draft_tokens
        for request in self.active:
            if request.state == State.CONTEXT:
                tokens += self._add_context(batch, request, self.config.max_num_tokens - tokens)
        while self.waiting and len(self.active) < self.config.max_batch_size and self._fits(self.waiting[0]):
            request = self.waiting[0]
            taken = self._add_context(batch, request, self.config.max_num_tokens - tokens)
            if taken == 0:
                break
            tokens += taken
            request.state = State.CONTEXT
            self.active.append(self.waiting.pop(0))
        return batch

    def _add_context(self, batch: Batch, request: EngineRequest, budget: int) -> int:
        chunk = self.config.chunk_tokens or request.remaining_prompt
        request.chunk = self.whole_blocks(request, request.position, min(chunk, request.remaining_prompt, budget))
        if request.chunk > 0 and (self.config.chunk_tokens or request.chunk == request.remaining_prompt):
            batch.context.append(request)
            return request.chunk
        return 0

    def whole_blocks(self, request: EngineRequest, position: int, chunk: int) -> int:
        """A chunk that does not end the prompt ends a block."""
        size = self.config.tokens_per_block
        end = position + chunk
        if end >= request.prompt_len:
            return request.prompt_len - position
        return max(0, end // size * size - position)

    def _fits(self, request: EngineRequest) -> bool:
        free = self.blocks.blocks_available()
        if self.config.max_utilization:
            return free >= self._blocks(request.prompt_len) + 1
        return free >= self._most(request) + sum(self._most(other) - held_blocks(other) for other in self.active)

    def _most(self, request: EngineRequest) -> int:
        spec = request.spec
        return self._blocks(len(spec.prompt) + spec.max_new_tokens + spec.draft_tokens + 1)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.tokens_per_block)

    def youngest(self, but: EngineRequest) -> EngineRequest | None:
        """The request that is sent back when blocks run out."""
        others = [r for r in self.active if r is not but and r.state in (State.CONTEXT, State.GENERATION) and r.pages]
        return others[-1] if others else None


def held_blocks(request: EngineRequest) -> int:
    return len(request.pages[0]) if request.pages else 0
