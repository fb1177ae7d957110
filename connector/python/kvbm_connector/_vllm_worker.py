"""The worker half of one rank: the engine's tensors and its calls around a pass, in the native module's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._native import Engine
from ._vllm_layout import layers_of, layout_of
from ._vllm_metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata


class WorkerHalf:
    def __init__(self, engine: Engine, blocks: int, replicated: bool) -> None:
        self.engine = engine
        self._blocks = blocks
        self._replicated = replicated
        self._stream: Callable[[], int] = lambda: 0
        self._loading: dict[int, str] = {}
        self._begun: list[int] = []
        self._idle = False
        # By name, its place in a block.
        self._layers: dict[str, int] = {}
        self._asks = False
        self.handshake: KvbmHandshake | None = None

    def register(self, tensors: dict[str, Any], layers: list[str] | None) -> None:
        """`layers`: names of those of a tensor that has them all; `None`: nothing waits for single layers."""
        device = next(iter(tensors.values())).device
        regions, layout = layout_of(tensors, self._blocks)
        # Before the kind of device there was room for a name that no version gave: keys stay what they are.
        layout = f"{layout}  {device.type}"
        if layers is not None:
            self._layers = layers_of(tensors, self._blocks, layers)
        count = max(len(self._layers), 1)
        if device.type == "cuda":
            # An engine with memory on a GPU has brought torch.
            import torch

            index = device.index if device.index is not None else torch.cuda.current_device()
            self.engine.register_cuda_memory([regions], layout, index, self._replicated, False, True, tensors, count)
            self._stream = lambda: int(torch.cuda.current_stream(index).cuda_stream)
        elif device.type == "cpu":
            # The engine's own memory, which the daemon cannot map.
            args = [regions], layout, "cpu:0", self._replicated, False, True, tensors, None, count
            self.engine.register_memory(*args)
        else:
            raise NotImplementedError(f"kvbm_connector: KV memory on {device}: a CPU or a GPU of NVIDIA is supported")
        self.handshake = KvbmHandshake(layout, self._replicated, sum(region[1] for region in regions))

    def bind(self, metadata: KvbmMetadata) -> None:
        # Whoever asks before loads were started has to wait for all that arrives.
        self._asks = True
        self.engine.bind(metadata.payload)
        self._loading.update(metadata.loading)
        self._begun = list(metadata.loading)
        self._idle = metadata.idle

    def start_loads(self, kind: str | None) -> None:
        """`kind`: of the pass, if its layers ask."""
        self._asks = self.engine.start_loads(self._stream(), not self._idle, kind if self._layers else None)

    def layer(self, name: str) -> None:
        if self._asks:
            # One that has no memory of its own may read any.
            self.engine.layer(self._layers.get(name, len(self._layers)), self._stream())

    def pass_done(self) -> None:
        self.engine.pass_done(self._stream())

    def loaded(self) -> set[str] | None:
        """Requests whose loads have ended since the last time, with their bytes there or not."""
        if not self._loading:
            return None
        if self._idle:
            # The engine would only ask again, a millisecond and a pass later.
            self.engine.wait_for_load()
        begun, self._begun = self._begun, []
        _, loaded = self.engine.get_finished([], begun)
        return {self._loading.pop(number) for number in loaded} or None

    def failed(self) -> set[int]:
        return set(self.engine.take_failed())

    def metadata(self) -> KvbmWorkerMetadata | None:
        orphaned, block_ns = self.engine.take_orphaned(), self.engine.take_block_ns()
        return KvbmWorkerMetadata(set(orphaned), block_ns) if orphaned or block_ns else None
