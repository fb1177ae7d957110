"""What the halves of the connector tell each other; the engine carries it between its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ._vllm_api import HandshakeMetadata, Metadata, WorkerMetadata


@dataclass
class KvbmMetadata(Metadata):  # type: ignore[misc]
    """Before each pass: the native module's words, and the engine's names of the requests that begin to load."""

    payload: bytes = b""
    loading: dict[int, str] = field(default_factory=dict)
    # Nothing is computed in the pass.
    idle: bool = False


@dataclass
class KvbmWorkerMetadata(WorkerMetadata):  # type: ignore[misc]
    """After a pass: requests whose blocks could not be saved, and what a block took to load, 0: nothing new."""

    orphaned: set[int] = field(default_factory=set)
    block_ns: int = 0

    def aggregate(self, other: Any) -> KvbmWorkerMetadata:
        return KvbmWorkerMetadata(self.orphaned | other.orphaned, max(self.block_ns, other.block_ns))


@dataclass
class KvbmHandshake(HandshakeMetadata):  # type: ignore[misc]
    """Once, at the start: what the scheduler half has to know of memory that it does not see."""

    layout: str
    replicated: bool
    block_bytes: int
