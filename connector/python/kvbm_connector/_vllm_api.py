"""The classes that a connector of vLLM derives from, and the versions that were tried."""

from __future__ import annotations

from typing import Any

# The line of versions this adapter was written for; what differs between them is told by what a version has.
OLDEST = (0, 26)


class _Absent:
    """Stands for a base class where there is no vLLM, so that this package can be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            f"{type(self).__module__}.{type(self).__name__} needs vLLM {OLDEST[0]}.{OLDEST[1]} or later, which cannot "
            f"be imported here: {_reason}. Name this class in --kv-transfer-config, do not make one yourself."
        )


class _AbsentMetadata:
    pass


_reason = ""
ConnectorBase: Any = _Absent
SupportsHybrid: Any = _AbsentMetadata
Metadata: Any = _AbsentMetadata
WorkerMetadata: Any = _AbsentMetadata
HandshakeMetadata: Any = _AbsentMetadata
Stats: Any = _AbsentMetadata
PromMetrics: Any = _AbsentMetadata

try:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics as _metrics
except ImportError as _error:
    _reason = str(_error)
else:
    ConnectorBase = _base.KVConnectorBase_V1
    SupportsHybrid = _base.SupportsHMA
    Metadata = _base.KVConnectorMetadata
    WorkerMetadata = _base.KVConnectorWorkerMetadata
    HandshakeMetadata = _base.KVConnectorHandshakeMetadata
    Stats = _metrics.KVConnectorStats
    PromMetrics = _metrics.KVConnectorPromMetrics


def block_first_layout() -> str | None:
    """The name of a layout with blocks outermost, in versions that name layouts; others ask for it by an attribute."""
    try:
        from vllm.platforms import current_platform
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:
        return None
    # Within a block in the order that the platform's attention prefers anyway.
    name = "BLHNC" if current_platform.is_cpu() else "BLNHC"
    return name if name in KVCacheLayout.__members__ else None
