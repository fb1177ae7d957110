"""vLLM (V1 engine): the class that `--kv-transfer-config` names.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvbmConnector",
        "kv_connector_module_path": "kvbm_connector.vllm", "kv_role": "kv_both"}'

It translates the engine's objects and decides nothing: what is found, promised, copied and given up, and how long
anything may take, is the native module's. Versions are told apart by what they have, never by their number:

* loads begin before each pass that computes: where a version would begin them behind it, it is told that it may not
* a pass whose layers ask for what they read may begin before all of it is there; one of a CUDA graph may not
* layers have tensors of their own, or share one: a block is all pieces of memory that belong to it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._vllm_api import ConnectorBase, SupportsHybrid, block_first_layout
from ._vllm_checks import (
    block_spec,
    check,
    is_replicated,
    layer_names,
    make_engine,
    prefers_cross_layer,
    waits_for_layers,
)
from ._vllm_metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from ._vllm_scheduler import SchedulerHalf
from ._vllm_stats import Counted, KvbmPromMetrics, KvbmStats
from ._vllm_worker import WorkerHalf

__all__ = ["KvbmConnector"]


def kind_of_pass(forward_context: Any) -> str | None:
    """Of passes whose attention may ask for layers: what tells those that behave alike. Nothing of those of which a CUDA
    graph has all, attention too."""
    if getattr(forward_context, "attn_metadata", None) is None:
        return None
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    kind = str(getattr(mode, "name", mode))
    return None if "FULL" in kind else f"{kind} {getattr(forward_context, 'skip_compiled', False)}"


class KvbmConnector(ConnectorBase, SupportsHybrid):  # type: ignore[misc]
    """Both halves have this class; the engine makes one in its scheduler's process and one in each worker's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(vllm_config, kv_cache_config)
        spec = block_spec(kv_cache_config)
        self._parked = False
        if role.name == "SCHEDULER":
            self._engine = make_engine(vllm_config, kv_cache_config, 0, "scheduler")
            self._scheduler = SchedulerHalf(self._engine, int(spec.block_size))
        else:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self._engine = make_engine(vllm_config, kv_cache_config, get_tensor_model_parallel_rank(), "worker")
            self._worker = WorkerHalf(self._engine, int(kv_cache_config.num_blocks), is_replicated(spec))
        self._counted = Counted(self._engine)
        self._cross_layer = prefers_cross_layer(vllm_config)
        self._config, self._layers = vllm_config, layer_names(kv_cache_config)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        return self._cross_layer

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a miss later, no more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return block_first_layout() if prefers_cross_layer(vllm_config) else None

    # In the scheduler's process.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KvbmHandshake]) -> None:
        facts = metadata[min(metadata)]
        self._engine.join(facts.layout, facts.replicated, facts.block_bytes)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens, self._parked = self._scheduler.look_up(request, num_computed_tokens)
        return tokens, self._parked

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        # Directly behind the question, whose answer it follows.
        self._scheduler.allocated(request, blocks, num_external_tokens, self._parked)

    def build_connector_meta(self, scheduler_output: Any) -> KvbmMetadata:
        if scheduler_output.num_scheduled_tokens and hasattr(scheduler_output, "has_sync_kv_loads"):
            # Else these versions call `start_load_kv` behind the pass, which would not wait for what still arrives.
            scheduler_output.has_sync_kv_loads = True
        return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.told(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        # Blocks are free at once: a copy of one that is used anew meanwhile does not count.
        self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # In each worker's process.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._register(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        self._register({"all layers": kv_cache})

    def _register(self, tensors: dict[str, Any]) -> None:
        by_layer = waits_for_layers(self._config, next(iter(tensors.values())).device.type)
        self._worker.register(tensors, self._layers if by_layer else None)

    def get_handshake_metadata(self) -> KvbmHandshake | None:
        return self._worker.handshake

    def bind_connector_metadata(self, connector_metadata: KvbmMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.start_loads(kind_of_pass(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves begin when the pass is over, for hooks of layers do not run in CUDA graphs."""

    def wait_for_save(self) -> None:
        self._worker.pass_done()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed()

    def build_connector_worker_meta(self) -> KvbmWorkerMetadata | None:
        return self._worker.metadata()

    # In both.

    def get_kv_connector_stats(self) -> KvbmStats | None:
        return self._counted.since()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats | None:
        return KvbmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[Any]:
        return ()

    def shutdown(self) -> None:
        self._engine.close()

    def figures(self) -> dict[str, int | str | None]:
        """Totals since the start, for tests and for the curious."""
        return self._engine.figures()
