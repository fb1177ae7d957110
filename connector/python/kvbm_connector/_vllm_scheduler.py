"""The scheduler half: what vLLM's scheduler does, in the native module's words."""

from __future__ import annotations

from typing import Any

from ._native import Engine
from ._vllm_metadata import KvbmMetadata
from ._vllm_request import Prompt, prompt_of

# As the native module's: tokens that it was asked about are not told again.
_Report = tuple[int, int, list[int] | None, list[list[int]], int, int | None, list[int] | None]


class _Known:
    """A request, and how much of it the native module was told."""

    def __init__(self, number: int, request: Any) -> None:
        self.number = number
        self.request = request
        # What was asked about: packing many tokens takes long enough to do it once only.
        self.prompt: Prompt | None = None
        self.asked = 0
        self.tokens = 0
        self.complete = 0


class SchedulerHalf:
    def __init__(self, engine: Engine, tokens_per_block: int) -> None:
        self.engine = engine
        self._size = tokens_per_block
        self._known: dict[str, _Known] = {}
        self._numbers = 0
        self._loading: dict[int, str] = {}

    def look_up(self, request: Any, local_tokens: int) -> tuple[int | None, bool]:
        known = self._known.get(request.request_id)
        if known is None:
            self._numbers += 1
            known = self._known[request.request_id] = _Known(self._numbers, request)
        if known.prompt is None or known.asked != request.num_tokens or known.prompt[0] is None:
            known.prompt, known.asked = prompt_of(request), request.num_tokens
        return self.engine.look_up(known.number, *known.prompt, local_tokens, len(self._known) - 1)

    def allocated(self, request: Any, blocks: Any, loaded_tokens: int, parked: bool) -> None:
        known = self._known.get(request.request_id)
        if known is None:
            return
        if loaded_tokens == 0:
            self.engine.declined(known.number)
            return
        self.engine.allocated(known.number, [list(pages) for pages in blocks.get_block_ids()])
        if parked:
            self._loading[known.number] = request.request_id

    def build(self, output: Any) -> KvbmMetadata:
        scheduled = output.num_scheduled_tokens
        new = [
            self._first(data.req_id, data.block_ids, data.num_computed_tokens, scheduled[data.req_id])
            for data in output.scheduled_new_reqs
        ]
        cached = []
        running = output.scheduled_cached_reqs
        for at, name in enumerate(running.req_ids):
            pages, computed = running.new_block_ids[at], running.num_computed_tokens[at]
            if name in running.resumed_req_ids:
                new.append(self._first(name, pages or (), computed, scheduled[name]))
            else:
                report = self._next(name, pages, computed, scheduled[name])
                if report is not None:
                    cached.append(report)
        payload = self.engine.build(new, cached)
        loading, self._loading = self._loading, {}
        return KvbmMetadata(payload, loading, not scheduled)

    def _first(self, name: str, pages: Any, computed: int, scheduled: int) -> _Report:
        """A request that begins, or begins again after its blocks were taken from it."""
        lists = [list(group) for group in pages]
        known = self._known.get(name)
        if known is None:
            return 0, 0, None, lists, computed, scheduled, None
        more = list(known.request.all_token_ids[known.asked :])
        known.prompt, known.tokens = None, known.asked + len(more)
        known.complete = min(computed + scheduled, known.tokens) // self._size
        return known.number, known.asked, more, lists, computed, scheduled, None

    def _next(self, name: str, pages: Any, computed: int, scheduled: int) -> _Report | None:
        """A request that goes on; nothing if that completes no block and takes none."""
        lists = [list(group) for group in pages or ()]
        known = self._known.get(name)
        if known is None:
            return (0, 0, None, lists, computed, scheduled, None) if lists else None
        complete = min(computed + scheduled, known.request.num_tokens) // self._size
        if complete <= known.complete and not any(lists):
            return None
        tokens = list(known.request.all_token_ids[known.tokens :])
        known.tokens += len(tokens)
        known.complete = max(complete, known.complete)
        return known.number, 0, tokens, lists, computed, scheduled, None

    def told(self, output: Any) -> None:
        """What the workers have to say after a pass."""
        failed = list(getattr(output, "invalid_block_ids", None) or ())
        worker = getattr(output, "kv_connector_worker_meta", None)
        orphaned, block_ns = list(getattr(worker, "orphaned", ())), getattr(worker, "block_ns", 0)
        if failed or orphaned or block_ns:
            self.engine.told(failed, orphaned, block_ns)

    def finished(self, request: Any) -> None:
        known = self._known.pop(request.request_id, None)
        if known is not None:
            self.engine.request_finished(known.number)
