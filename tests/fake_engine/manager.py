"""What TensorRT-LLM's KvCacheConnectorManager does: it stands between the executor and the connector's two halves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from . import contract
from .callbacks import Callbacks
from .comm import Comm
from .faults import PROTOCOL
from .llm_args import LlmArgs
from .memory import KvMemory
from .request import BaseLlmRequest, EngineRequest, LlmRequest, State, numbers

# Lists of tokens that somebody else keeps, too, are shorter: giving back long ones takes time, which `load` measures.
KEPT_TOKENS_MAX = 4096


@dataclass
class Vintage:
    """Which of the published interfaces the executor speaks."""

    api: str = "L1"
    early: bool = False

    @property
    def by_group(self) -> bool:
        return self.api == "L2"


@dataclass
class _Ids:
    loading: dict[int, EngineRequest] = field(default_factory=dict)
    saving: dict[int, EngineRequest] = field(default_factory=dict)


class ConnectorManager:
    def __init__(
        self, vintage: Vintage, args: LlmArgs, tokens_per_block: int, scheduler: type | None, worker: type,
        comm: Comm, callbacks: Callbacks,
    ) -> None:
        self.vintage = vintage
        self.tokens_per_block = tokens_per_block
        self.comm = comm
        self.callbacks = callbacks
        self.new = _Ids()
        self.pending = _Ids()
        self._local_loaded: set[int] = set()
        self._local_saved: set[int] = set()
        self._reported_loading: dict[int, EngineRequest] = {}
        self._reported_saving: dict[int, EngineRequest] = {}
        self.loaded_ok: set[int] = set()
        self._seen: dict[int, tuple[int, list[int]]] = {}
        self._external: dict[int, int] = {}
        self._kept_ids: set[int] = set()
        with ThreadPoolExecutor(2) as pool:
            made_scheduler = pool.submit(scheduler, args) if scheduler is not None else None
            made_worker = pool.submit(worker, args)
            self.scheduler: Any = made_scheduler.result() if made_scheduler is not None else None
            self.worker: Any = made_worker.result()
        self.forward_callable = callbacks.call(
            "register_forward_pass_callable", self.worker.register_forward_pass_callable
        )
        if self.forward_callable is not None and not callable(self.forward_callable):
            raise callbacks.dead(PROTOCOL, "register_forward_pass_callable gave neither a callable nor None")

    def register(self, memory: KvMemory) -> None:
        """After warm-up, before the loop starts."""
        if self.vintage.by_group:
            self.callbacks.call("register_kv_cache_layout", self.worker.register_kv_cache_layout, memory.layout())
        else:
            self.callbacks.call("register_kv_caches", self.worker.register_kv_caches, memory.tensor())
        if self.scheduler is not None and hasattr(self.scheduler, "wait_for_initialization"):
            self.callbacks.call("wait_for_initialization", self.scheduler.wait_for_initialization)

    def _on_leader(self, function: Callable[[], Any]) -> Any:
        return self.comm.broadcast(function() if self.comm.rank == 0 else None)

    # The scheduler half's callbacks.

    def query(self, request: EngineRequest, local: int) -> tuple[int, bool]:
        def ask() -> tuple[int, bool]:
            view: Any = LlmRequest(request) if self.vintage.by_group else BaseLlmRequest(request, self.vintage.early)
            keeps = request.request_id % 4 == 0 and request.prompt_len <= KEPT_TOKENS_MAX
            kept: list[int] | None = view.get_tokens(0) if keeps else None
            if keeps:
                view.get_tokens = lambda beam: kept
            view.get_tokens = self.callbacks.engines_own(view.get_tokens)
            answer = self.callbacks.call(
                "get_num_new_matched_tokens", self.scheduler.get_num_new_matched_tokens, view, local
            )
            if kept is not None and kept != request.tokens:
                raise self.callbacks.dead(PROTOCOL, "a list of tokens that the connector was shown is not what it was")
            self._check_offer(answer, request, local)
            return answer[0], answer[1]

        if request.spec.generation_only:
            raise self.callbacks.dead(PROTOCOL, "Connector API is not supported for generation-only requests!")
        count, asynchronous = self._on_leader(ask)
        if asynchronous:
            self.new.loading[request.request_id] = request
        return count, asynchronous

    def _check_offer(self, answer: object, request: EngineRequest, local: int) -> None:
        dead = self.callbacks.dead
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise dead(PROTOCOL, f"get_num_new_matched_tokens gave {answer!r}, not (count, flag)")
        count, asynchronous = answer
        if type(count) is not int or count < 0 or type(asynchronous) is not bool:
            raise dead(PROTOCOL, f"get_num_new_matched_tokens gave {answer!r}, not (count, flag)")
        if count == 0 and asynchronous:
            raise dead(PROTOCOL, "load_kv_async must be False when num_tokens is 0!")
        if local + count >= request.prompt_len:
            raise dead(PROTOCOL, f"offer of {count} behind {local} leaves no token of a prompt of {request.prompt_len}")

    def commit(self, request: EngineRequest, count: int) -> None:
        """The executor takes `count` tokens of the offer."""
        request.matched_by_connector = count
        self._external[request.request_id] = count

    def allocated(self, request: EngineRequest) -> None:
        """Leader only and without a collective."""
        if self.comm.rank != 0:
            return
        view = LlmRequest(request, self.vintage.early)
        if self.vintage.by_group:
            groups = [list(pages) for pages in request.pages]
            self.callbacks.call(
                "update_state_after_alloc", self.scheduler.update_state_after_alloc_by_layer_group, view, groups
            )
        else:
            self.callbacks.call(
                "update_state_after_alloc", self.scheduler.update_state_after_alloc, view, list(request.pages[0])
            )

    def report(self, context: list[EngineRequest], generation: list[EngineRequest]) -> contract.SchedulerOutput:
        """What the pass will compute; requests whose load is about to be parked are not in it."""
        output = contract.SchedulerOutput()
        for request in context + generation:
            if request.request_id in self.new.loading:
                continue
            is_new = request.request_id not in self._seen
            data = self._data(request, in_context=request in context)
            (output.new_requests if is_new else output.cached_requests).append(data)
        self._external.clear()
        return output

    def _data(self, request: EngineRequest, in_context: bool) -> Any:
        known_tokens, known_blocks = self._seen.get(request.request_id, (0, [0] * len(request.pages)))
        tokens = numbers(request.tokens[known_tokens:]).tolist()
        groups = [list(pages[known:]) for pages, known in zip(request.pages, known_blocks, strict=True)]
        self._seen[request.request_id] = (len(request.tokens), [len(pages) for pages in request.pages])
        if in_context:
            computed = request.position - self._external.get(request.request_id, 0)
            scheduled = request.chunk
        else:
            computed, scheduled = len(request.tokens) - 1, 1 + request.spec.draft_tokens
        flat = groups[0] if len(groups) == 1 else []
        if self.vintage.early:
            return contract.EarlyRequestData(request.request_id, tokens, flat, computed, scheduled)
        data = contract.RequestData(request.request_id, tokens, flat, computed, scheduled)
        data.cache_salt = request.spec.cache_salt
        if self.vintage.by_group:
            data.new_block_ids_by_layer_group = groups
            return data
        size = self.tokens_per_block
        request.digests.extend(request.tokens, len(request.tokens))
        data.block_hashes = [request.digests.block_hash(end) for end in range(size, len(request.tokens) + 1, size)]
        if request.spec.retention is not None:
            first = known_blocks[0]
            data.priorities = [self._priority(request, first + index, size) for index in range(len(flat))]
        return data

    @staticmethod
    def _priority(request: EngineRequest, ordinal: int, size: int) -> int:
        assert request.spec.retention is not None
        priority, _ = request.spec.retention.block(ordinal, size, request.prompt_len)
        return 35 if priority is None else priority

    def build_metadata(self, output: contract.SchedulerOutput) -> object:
        def build() -> object:
            return self.callbacks.call("build_connector_meta", self.scheduler.build_connector_meta, output)

        try:
            return self._on_leader(build)
        except (TypeError, AttributeError, ValueError) as error:
            raise self.callbacks.dead(PROTOCOL, f"metadata cannot be pickled: {error}") from error

    def take_parked(self, context: list[EngineRequest]) -> list[EngineRequest]:
        """Requests of this batch whose load was just started."""
        parked = [request for request in context if request.request_id in self.new.loading]
        for request in parked:
            request.state = State.PARKED
        return parked

    def finished(self, request: EngineRequest) -> bool:
        """A request ended by itself. True: its blocks stay until the save is reported."""

        def ask() -> object:
            view = LlmRequest(request, self.vintage.early)
            if self.vintage.by_group:
                groups = [list(pages) for pages in request.pages]
                return self.callbacks.call(
                    "request_finished", self.scheduler.request_finished_by_layer_group, view, groups
                )
            return self.callbacks.call(
                "request_finished", self.scheduler.request_finished, view, list(request.pages[0])
            )

        keep = self._on_leader(ask)
        if type(keep) is not bool:
            raise self.callbacks.dead(PROTOCOL, f"request_finished gave {keep!r}, not a bool")
        self.loaded_ok.discard(request.request_id)
        if keep and request.request_id in self._kept_ids:
            self.callbacks.violation(PROTOCOL, f"request_finished said True twice for request {request.request_id}")
            return False
        if keep:
            self._kept_ids.add(request.request_id)
            self.new.saving[request.request_id] = request
        return keep

    def forget(self, request_id: int) -> None:
        """L2: the allocation was dropped, its next report is a first one."""
        self._seen.pop(request_id, None)
        self.loaded_ok.discard(request_id)

    # The end of every iteration.

    def load_is_local(self, request_id: int) -> bool:
        """This rank has not reported the load yet, so its writes may still arrive."""
        return request_id in self.new.loading or request_id in self.pending.loading

    def poll(self) -> tuple[list[EngineRequest], list[EngineRequest]]:
        """(requests saved on all ranks, requests loaded on all ranks)."""
        new, self.new = self.new, _Ids()
        self.pending.loading.update(new.loading)
        self.pending.saving.update(new.saving)
        answer = self.callbacks.call("get_finished", self.worker.get_finished, list(new.saving), list(new.loading))
        saved, loaded = self._check_finished(answer)
        self._local_saved |= saved
        self._local_loaded |= loaded
        everywhere = self.comm.allgather((self._local_saved, self._local_loaded))
        all_saved = set.intersection(*(saved for saved, _ in everywhere))
        all_loaded = set.intersection(*(loaded for _, loaded in everywhere))
        self._local_saved -= all_saved
        self._local_loaded -= all_loaded
        self.loaded_ok |= all_loaded
        return (
            [self._reported_saving.pop(id_) for id_ in sorted(all_saved)],
            [self._reported_loading.pop(id_) for id_ in sorted(all_loaded)],
        )

    def _check_finished(self, answer: object) -> tuple[set[int], set[int]]:
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise self.callbacks.dead(PROTOCOL, f"get_finished gave {answer!r}, not (saved, loaded)")
        sets = []
        waits = (self.pending.saving, self._reported_saving), (self.pending.loading, self._reported_loading)
        for ids, (pending, reported) in zip(answer, waits, strict=True):
            if not isinstance(ids, list) or any(type(id_) is not int for id_ in ids):
                raise self.callbacks.dead(PROTOCOL, f"get_finished gave {ids!r}, not a list of request ids")
            for id_ in ids:
                if id_ not in pending:
                    raise self.callbacks.dead(PROTOCOL, f"get_finished gave id {id_}, which is not waited for")
                reported[id_] = pending.pop(id_)
            sets.append(set(ids))
        return sets[0], sets[1]

    @property
    def saves_wait(self) -> bool:
        return bool(self.new.saving or self.pending.saving or self._reported_saving)
