"""What TensorRT-LLM's executor and a KV connector say to each other: the data, and the two classes to derive from.

Two lines of the interface exist and a connector has to tell them apart by what it finds, never by a version number:
L1, one flat pool (`register_kv_caches`), and L2, a layout of layer groups whose page lists may hold -1. The stub
modules (`stub_modules.py`) publish one of the two under TensorRT-LLM's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

BAD_PAGE_INDEX = -1


@dataclass
class RequestData:
    """One request in one report to the scheduler half. Lists hold what is new since the last report."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass
class EarlyRequestData:
    """The same of the first releases: no hashes, no priorities, and the salt only on the request, as a number."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@dataclass
class SchedulerOutput:
    """What one pass will compute."""

    new_requests: list[Any] = field(default_factory=list)
    cached_requests: list[Any] = field(default_factory=list)


class _WorkerBase(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: object = None
        super().__init__()

    def register_forward_pass_callable(self) -> Callable[[], None] | None:
        return None

    def bind_connector_meta(self, metadata: object) -> None:
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]: ...


class _SchedulerBase(ABC):
    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]: ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object: ...


class FlatWorker(_WorkerBase):
    """L1's KvCacheConnectorWorker."""

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...


class FlatScheduler(_SchedulerBase):
    """L1's KvCacheConnectorScheduler."""

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool: ...


class FlatSchedulerWithInitialization(FlatScheduler):
    """L1 as published later: a call at the end of the start."""

    def wait_for_initialization(self) -> None:
        return None


class LayoutWorker(_WorkerBase):
    """L2's KvCacheConnectorWorker: one of the two registrations has to be there."""

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        raise NotImplementedError("this connector registers layouts")

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        self.register_kv_caches(layout.as_single_pool_tensor())


class LayoutScheduler(_SchedulerBase):
    """L2's KvCacheConnectorScheduler: the by-group forms fall back to the flat ones where one group exists."""

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        raise NotImplementedError("this connector takes page lists by layer group")

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        raise NotImplementedError("this connector takes page lists by layer group")

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        self.update_state_after_alloc(request, _only_group(block_ids_by_layer_group))

    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: list[list[int]]) -> bool:
        return self.request_finished(request, _only_group(cache_block_ids_by_layer_group))

    def wait_for_initialization(self) -> None:
        return None


def _only_group(groups: list[list[int]]) -> list[int]:
    if len(groups) != 1:
        raise NotImplementedError(f"a flat connector got {len(groups)} layer groups")
    return groups[0]


@dataclass(frozen=True)
class KvCacheBufferRef:
    """One buffer inside a region's slot."""

    layer_id: int
    role: str
    expansion: int = 1


class KvCacheRegion:
    """Slot i is `size` bytes at `base + stride * i`."""

    def __init__(
        self, base: int, size: int, stride: int, num_slots: int, buffers: list[KvCacheBufferRef],
        tensor: Callable[[], Any], memfd: tuple[int, int] | None,
    ) -> None:
        self.base = base
        self.size = size
        self.stride = stride
        self.num_slots = num_slots
        self.buffers = buffers
        self._tensor = tensor
        if memfd is not None:
            self.memfd = memfd

    def address_of(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return self.base + self.stride * slot

    def as_tensor(self) -> Any:
        return self._tensor()


class KvCacheLayerGroupLayout:
    """Layers that share page numbers."""

    def __init__(
        self, layer_group_id: int, layer_ids: list[int], window_size: int | None, regions: list[KvCacheRegion]
    ) -> None:
        self.layer_group_id = layer_group_id
        self.layer_ids = layer_ids
        self.window_size = window_size
        self.regions = regions

    @property
    def bytes_per_page(self) -> int:
        return sum(region.size for region in self.regions)


class KvCacheLayout:
    """All KV memory of one rank."""

    def __init__(
        self, tokens_per_block: int, groups: list[KvCacheLayerGroupLayout], single_pool: Callable[[], Any] | None
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.groups = groups
        self._single_pool = single_pool

    def group(self, layer_group_id: int) -> KvCacheLayerGroupLayout:
        return next(group for group in self.groups if group.layer_group_id == layer_group_id)

    def group_of_layer(self, layer: int) -> KvCacheLayerGroupLayout:
        return next(group for group in self.groups if layer in group.layer_ids)

    def as_single_pool_tensor(self) -> Any:
        if self._single_pool is None:
            raise NotImplementedError("this layout is not one contiguous pool")
        return self._single_pool()


def valid_page_slots(pages: list[int]) -> Iterator[tuple[int, int]]:
    """(ordinal, page) of the pages that exist."""
    return ((ordinal, page) for ordinal, page in enumerate(pages) if page != BAD_PAGE_INDEX)
