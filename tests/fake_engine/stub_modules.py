"""Puts modules with TensorRT-LLM's names into `sys.modules`, holding one line of the connector interface."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from . import contract
from .llm_args import LlmArgs
from .request import BaseLlmRequest

OLD_PATH = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
NEW_PATH = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
LAYOUT_PATH = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_layout"


def install(api: str, import_path: str, early: bool) -> None:
    """`api` L1 or L2; `import_path` old or new; `early`: L1 as in its first releases."""
    path = OLD_PATH if import_path == "old" else NEW_PATH
    if api == "L1":
        scheduler: type = contract.FlatScheduler if early else contract.FlatSchedulerWithInitialization
        worker: type = contract.FlatWorker
    else:
        scheduler, worker = contract.LayoutScheduler, contract.LayoutWorker
        publish(
            LAYOUT_PATH,
            KvCacheLayout=contract.KvCacheLayout,
            KvCacheLayerGroupLayout=contract.KvCacheLayerGroupLayout,
            KvCacheRegion=contract.KvCacheRegion,
            KvCacheBufferRef=contract.KvCacheBufferRef,
            BAD_PAGE_INDEX=contract.BAD_PAGE_INDEX,
            valid_page_slots=contract.valid_page_slots,
        )
    publish(
        path,
        KvCacheConnectorScheduler=scheduler,
        KvCacheConnectorWorker=worker,
        RequestData=contract.EarlyRequestData if early else contract.RequestData,
        SchedulerOutput=contract.SchedulerOutput,
    )
    publish("tensorrt_llm.llmapi.llm_args", TorchLlmArgs=LlmArgs)
    publish("tensorrt_llm.bindings.internal.batch_manager", LlmRequest=BaseLlmRequest)


def publish(path: str, **names: Any) -> None:
    parent: ModuleType | None = None
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module = sys.modules.get(name)
        if module is None:
            module = ModuleType(name)
            module.__path__ = []
            sys.modules[name] = module
            if parent is not None:
                setattr(parent, parts[depth - 1], module)
        parent = module
    for name, value in names.items():
        setattr(parent, name, value)
