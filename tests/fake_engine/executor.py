"""The executor's loop on one rank, one iteration per call. Every rank runs the same and comes to the same."""

from __future__ import annotations

from dataclasses import dataclass

from . import forward as forward_pass
from .blocks import BlockManager, first_in_window
from .callbacks import Callbacks
from .config import EngineConfig
from .content import Digests
from .faults import BAD_LOAD, STRAY_WRITE
from .manager import ConnectorManager
from .memory import KvMemory
from .prepare import Preparation
from .request import EngineRequest, RequestSpec, State
from .schedule import Batch, Scheduler


@dataclass(frozen=True)
class Submit:
    spec: RequestSpec


@dataclass(frozen=True)
class Cancel:
    request_id: int


@dataclass(frozen=True)
class CancelWhenParked:
    """A cancel that comes in the very iteration in which the request's load is started."""

    request_id: int


@dataclass(frozen=True)
class DropUnused:
    """The engine forgets the blocks it keeps for reuse; what lies in them stays until they have new owners."""


Operation = Submit | Cancel | CancelWhenParked | DropUnused


class Executor:
    def __init__(
        self, config: EngineConfig, memory: KvMemory, manager: ConnectorManager, callbacks: Callbacks
    ) -> None:
        self.config = config
        self.memory = memory
        self.manager = manager
        self.callbacks = callbacks
        self.blocks = BlockManager(config.geometry(), config.free_order, config.seed)
        self.scheduler = Scheduler(config, self.blocks)
        self.requests: dict[int, EngineRequest] = {}
        self.iteration = 0
        self.current, self.execution = memory.streams()
        self._forward = forward_pass.Forward(config, memory, manager, callbacks)
        self._preparation = Preparation(config, memory, manager, callbacks, self.blocks, self.scheduler)
        self._previous: forward_pass.Pass | None = None
        self._cancels: list[int] = []
        self._cancel_when_parked: set[int] = set()

    def step(self, operations: list[Operation]) -> bool:
        """One iteration. False: nothing to do, the loop waits for a request and calls nothing."""
        for operation in operations:
            self._take(operation)
        if not (self.scheduler.active or self.scheduler.waiting):
            return False
        self.iteration += 1
        self.callbacks.iteration = self.iteration
        self.blocks.refresh(self.iteration)
        batch = self.scheduler.next_batch()
        if batch:
            self._launch_loads(batch)
        launched = self._compute(batch) if batch else None
        target = self._previous if self.config.overlap else launched
        self._previous = launched if self.config.overlap else None
        if target is not None:
            self._process(target)
        self._apply_cancels()
        self._release_finished()
        self._poll()
        return True

    def _take(self, operation: Operation) -> None:
        if isinstance(operation, Submit):
            spec = operation.spec
            request = EngineRequest(spec, Digests(spec.cache_salt, spec.lora_task_id, spec.multimodal))
            self.requests[spec.request_id] = request
            self.scheduler.waiting.append(request)
        elif isinstance(operation, Cancel):
            # A cancel is looked at when an iteration ends, also when it came with the request itself.
            self._cancels.append(operation.request_id)
        elif isinstance(operation, CancelWhenParked):
            self._cancel_when_parked.add(operation.request_id)
        else:
            self.blocks.drop_unused()

    def _launch_loads(self, batch: Batch) -> None:
        self._preparation.run(batch)
        output = self.manager.report(batch.context, batch.generation)
        parked = self.manager.take_parked(batch.context)
        metadata = self.manager.build_metadata(output)
        worker = self.manager.worker
        if self.config.empty_metadata:
            for nothing in (None, b""):
                self.callbacks.call("bind_connector_meta", worker.bind_connector_meta, nothing)
                self.callbacks.call("start_load_kv", worker.start_load_kv, self.current)
        self.callbacks.call("bind_connector_meta", worker.bind_connector_meta, metadata)
        self.callbacks.call("start_load_kv", worker.start_load_kv, self.current)
        self._preparation.poison_fresh()
        for request in parked:
            batch.context.remove(request)

    def _compute(self, batch: Batch) -> forward_pass.Pass:
        if self.memory.on_cuda:
            import torch  # type: ignore[import-not-found,unused-ignore]

            self.execution.wait_stream(self.current)
            with torch.cuda.stream(self.execution):
                launched = self._forward.run(batch, self.execution)
            self.current.wait_stream(self.execution)
        else:
            launched = self._forward.run(batch, self.execution)
        self.callbacks.call_in_forward("wait_for_save", self.manager.worker.wait_for_save, self.current)
        for request in batch.context:
            if request.position >= request.prompt_len and self.config.block_reuse:
                self.blocks.keep(request, request.prompt_len)
        for request in batch.generation:
            # Its length is known before its last pass is processed, so it is in no further batch.
            launched_tokens = len(request.device_tokens) - len(request.spec.prompt)
            if not request.spec.draft_tokens and launched_tokens >= request.spec.max_new_tokens:
                request.state = State.TO_COMPLETE
        for request in batch.context:
            if request.state == State.GENERATION and (request.spec.context_only or request.spec.max_new_tokens == 1):
                request.state = State.TO_COMPLETE
        return launched

    def _process(self, target: forward_pass.Pass) -> None:
        """Tokens of a pass reach the host; requests that are at their end finish."""
        self._forward.resolve(target)
        for request, count in target.entries:
            if request.state in (State.CANCELLED, State.COMPLETE, State.WAITING):
                continue
            again = request.is_finished
            if not again:
                self._append(request, count)
            if request.is_finished:
                # A request that ended by a stop word was launched once more, so it comes here a second time.
                keep = self.manager.finished(request)
                if not again:
                    request.state = State.SAVING if keep else State.FINISHED

    def _append(self, request: EngineRequest, count: int) -> None:
        spec = request.spec
        most = 1 if spec.context_only else spec.max_new_tokens
        most = most if spec.stop_after is None else min(most, spec.stop_after)
        upto = min(len(request.tokens) + count, len(spec.prompt) + most)
        request.tokens += request.device_tokens[len(request.tokens) : upto]
        if request.generated >= most:
            request.state = State.FINISHED

    def _apply_cancels(self) -> None:
        cancels, self._cancels = self._cancels, []
        cancels += [id_ for id_ in sorted(self._cancel_when_parked) if self.requests[id_].state == State.PARKED]
        for request_id in cancels:
            request = self.requests[request_id]
            self._cancel_when_parked.discard(request_id)
            if request in self.scheduler.waiting:
                self.scheduler.waiting.remove(request)
            elif request not in self.scheduler.active or request.is_finished:
                continue
            else:
                self.scheduler.active.remove(request)
                late = self.manager.load_is_local(request_id)
                freed = self.blocks.release(request, self.iteration)
                if late:
                    self._preparation.expect_late_writes(freed)
            request.state = State.CANCELLED

    def _release_finished(self) -> None:
        for request in [r for r in self.scheduler.active if r.is_finished]:
            self.scheduler.active.remove(request)
            if self.config.block_reuse:
                self.blocks.keep(request, min(request.kv_len, len(request.tokens) - 1))
            if request.state == State.FINISHED:
                self._terminate(request)

    def _terminate(self, request: EngineRequest) -> None:
        self.blocks.release(request, self.iteration)
        request.state = State.COMPLETE

    def _poll(self) -> None:
        saved, loaded = self.manager.poll()
        for request in loaded:
            if request.state == State.PARKED:
                self._check_load(request)
                request.state = State.CONTEXT
        for request in saved:
            if request.state == State.SAVING:
                self._terminate(request)

    def _check_load(self, request: EngineRequest) -> None:
        """A load that is said to be over has to have brought the right bytes."""
        if not self.config.verify:
            return
        start, end = request.local_match, request.local_match + request.matched_by_connector
        request.digests.extend(request.tokens, end)
        for group, shape in enumerate(self.memory.geometry.groups):
            first = max(start, 0 if shape.window is None else end + 1 - shape.window)
            if first >= end:
                continue
            for layer in shape.layers:
                numbers = request.digests.numbers(first, end)
                check = self.memory.read(group, layer, request.pages[group], first, numbers)
                wrong = check() if check is not None else None
                if wrong is not None:
                    self.callbacks.violation(BAD_LOAD, f"request {request.request_id}: {wrong}")
                    return

    def audit(self) -> None:
        """Reads everything that is kept or held, and looks for changes in what is free."""
        if not self.config.verify:
            return
        self.memory.synchronize()
        for node in self.blocks.nodes:
            for group, page in enumerate(node.pages):
                if page >= 0:
                    self._audit_page(group, page, node.numbers, "a kept block")
        for request in self.requests.values():
            size = self.config.tokens_per_block
            for group in range(len(request.pages)):
                first = first_in_window(request.kv_len, self.memory.geometry.groups[group].window, size)
                for ordinal in range(first, request.kv_len // size):
                    numbers = request.digests.numbers(ordinal * size, (ordinal + 1) * size)
                    page = request.pages[group][ordinal]
                    self._audit_page(group, page, numbers, f"request {request.request_id}")
        self._preparation.audit_free()

    def _audit_page(self, group: int, page: int, numbers: object, whose: str) -> None:
        for layer in self.memory.geometry.groups[group].layers:
            check = self.memory.read(group, layer, [page], 0, numbers)  # type: ignore[arg-type]
            wrong = check() if check is not None else None
            if wrong is not None:
                self.callbacks.violation(STRAY_WRITE, f"{whose}: {wrong}")
                return
