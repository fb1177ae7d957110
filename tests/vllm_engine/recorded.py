"""Connectors for tests: they remember what the engine said of requests that ended, and one of them lies."""

from __future__ import annotations

from typing import Any

from kvbm_connector.vllm import KvbmConnector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

# Blocks of requests that ended, in this process: the engine's core runs in it.
ended: dict[str, list[int]] = {}


class Recorded(KvbmConnector):
    """Ours."""

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        ended[request.request_id] = list(block_ids)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        return self.request_finished(request, block_ids[0])


class Nothing(KVConnectorMetadata):
    pass


class Idle(KVConnectorBase_V1):
    """Finds nothing and saves nothing: the engine with its own prefix cache alone."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> Nothing:
        return Nothing()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        ended[request.request_id] = list(block_ids)
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


class Liar(Idle):
    """Claims that all whole blocks are there and loads none: what finds nothing wrong with it finds nothing."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return max(0, (request.num_tokens - 1) // 32 * 32 - num_computed_tokens), False


class WorkerExtension:
    """What the test asks of the engine's workers."""

    def block_checksums(self, blocks: list[int]) -> list[str]:
        """Of the bytes of each block in all layers."""
        import hashlib

        import torch

        sums = []
        for block in blocks:
            digest = hashlib.sha256()
            for cache in self.model_runner.kv_caches:  # type: ignore[attr-defined]
                assert cache.device.type == "cpu", "the layout of a CPU is read here"
                digest.update(cache[block].contiguous().view(torch.uint8).numpy().tobytes())
            sums.append(digest.hexdigest()[:16])
        return sums

    def connector_figures(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        figures: dict[str, Any] = get_kv_transfer_group().figures()
        return figures
