"""TensorRT-LLM (PyTorch backend): the two classes that `kv_connector_config` names.

They translate the engine's objects and decide nothing: whole blocks, promises, safety and deadlines are in the native
module. All lines of the connector interface are told apart by what the engine has, never by its version:

* flat: `register_kv_caches`, `update_state_after_alloc`, `request_finished`
* by layer group: `register_kv_cache_layout`, `..._by_layer_group`; page numbers of -1 stand for no page
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ._trtllm_api import SchedulerBase, WorkerBase
from ._trtllm_checks import check_llm_args, check_pool
from ._trtllm_engine import engine_of, register_layout, register_tensor
from ._trtllm_request import prompt_of, report_of

__all__ = [
    "DynamoKVBMConnectorLeader",
    "DynamoKVBMConnectorWorker",
    "KvbmConnectorScheduler",
    "KvbmConnectorWorker",
]


def _pages(block_ids: Iterable[int]) -> list[list[int]]:
    return [list(block_ids)]


def _pages_by_group(groups: Any) -> list[list[int]]:
    # A development version passed a dictionary from the group's number.
    ordered = [groups[key] for key in sorted(groups)] if isinstance(groups, dict) else groups
    return [list(pages) for pages in ordered]


def _stream(stream: Any) -> int:
    return int(getattr(stream, "cuda_stream", 0) or 0)


class KvbmConnectorScheduler(SchedulerBase):
    """Scheduler half, on rank 0."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        check_llm_args(llm_args)
        self._engine = engine_of(llm_args, "scheduler")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._engine.query(*prompt_of(request), num_computed_tokens)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self._engine.allocated(request.request_id, _pages(block_ids))

    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids_by_layer_group: Any) -> None:
        self._engine.allocated(request.request_id, _pages_by_group(block_ids_by_layer_group))

    def build_connector_meta(self, scheduler_output: Any) -> bytes:
        new = [report_of(data) for data in scheduler_output.new_requests]
        cached = [report_of(data) for data in scheduler_output.cached_requests]
        return self._engine.build(new, cached)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self._engine.request_finished(request.request_id)

    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: Any) -> bool:
        return self._engine.request_finished(request.request_id)

    def wait_for_initialization(self) -> None:
        """Serving starts at once; blocks are found as soon as the daemon is there."""

    def figures(self) -> dict[str, int | str | None]:
        """Totals since the start, for tests and for the curious."""
        return self._engine.figures()


class KvbmConnectorWorker(WorkerBase):
    """Worker half, on every rank."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        check_llm_args(llm_args)
        self._llm_args = llm_args
        self._engine = engine_of(llm_args, "worker")
        self._current_stream: Callable[[], int] = lambda: 0

    def register_forward_pass_callable(self) -> Callable[[], None]:
        return lambda: self._engine.pass_done(self._current_stream())

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        check_pool(self._llm_args, kv_cache_tensor)
        self._current_stream = register_tensor(self._engine, self._llm_args, kv_cache_tensor)

    def register_kv_cache_layout(self, layout: Any) -> None:
        self._current_stream = register_layout(self._engine, self._llm_args, layout)

    def bind_connector_meta(self, metadata: Any) -> None:
        # Ranks of some versions are given nothing when there is nothing to say.
        self._metadata = metadata
        if metadata:
            self._engine.bind(metadata)

    def start_load_kv(self, stream: Any) -> None:
        self._engine.start_loads(_stream(stream))

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Loads are complete before the pass: hooks of layers do not run in CUDA graphs."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Saves begin when the pass is over, for the same reason."""

    def wait_for_save(self, stream: Any) -> None:
        self._engine.pass_done(_stream(stream))

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        return self._engine.get_finished(finished_gen_req_ids, started_loading_req_ids)

    def attached(self) -> bool:
        """Whether this rank has a session with the daemon."""
        return self._engine.attached

    def figures(self) -> dict[str, int | str | None]:
        """Totals since the start."""
        return self._engine.figures()


# The names of KVBM's connector: who comes from there changes the module's name only.
DynamoKVBMConnectorLeader = KvbmConnectorScheduler
DynamoKVBMConnectorWorker = KvbmConnectorWorker
