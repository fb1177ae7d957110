"""The classes that a connector of TensorRT-LLM derives from, wherever this version has them."""

from __future__ import annotations

import importlib
from typing import Any

# The module moved in the course of 2026.
_MODULES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)


class _Absent:
    """Stands for a base class where there is no TensorRT-LLM, so that this package can be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            f"{type(self).__module__}.{type(self).__name__} needs TensorRT-LLM with the PyTorch backend (1.1 or later), "
            "which cannot be imported here: "
            f"{_reason}. Name this class in kv_connector_config of an engine, do not make one yourself."
        )


def _bases() -> tuple[Any, Any, str]:
    reason = ""
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            reason = str(error)
            continue
        return module.KvCacheConnectorScheduler, module.KvCacheConnectorWorker, ""
    return _Absent, _Absent, reason


_found: tuple[Any, Any, str] = _bases()
SchedulerBase: Any = _found[0]
WorkerBase: Any = _found[1]
_reason = _found[2]
