"""The native engine of this process, made from the engine's settings and memory."""

from __future__ import annotations

import atexit
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

from ._native import Engine, model_fingerprint, socket_of
from ._trtllm_checks import setting_at

# Scheduler and worker of rank 0 are made at the same time in threads of one process, from the same settings object: by
# it they find each other. What is half made is kept here; once both halves are there, they alone keep it.
_lock = threading.Lock()
_half_made: dict[int, tuple[Any, Engine, str]] = {}


def engine_of(llm_args: Any, half: str) -> Engine:
    """The engine of this process that has these settings; made by whichever half comes first."""
    with _lock:
        made = _half_made.get(id(llm_args))
        if made is not None and made[2] != half:
            del _half_made[id(llm_args)]
            return made[1]
        engine = _make(llm_args)
        atexit.register(engine.close)
        if _rank(llm_args)[0] == 0:
            # Keeping the settings keeps their identity from being used again.
            _half_made[id(llm_args)] = (llm_args, engine, half)
        return engine


def _rank(llm_args: Any) -> tuple[int, int]:
    parallel = getattr(llm_args, "parallel_config", None)
    mapping = parallel.to_mapping() if parallel is not None else None
    return int(getattr(mapping, "rank", 0)), int(getattr(mapping, "world_size", 1) or 1)


def _make(llm_args: Any) -> Engine:
    rank, rank_count = _rank(llm_args)
    model = os.fspath(setting_at(llm_args, "model", "") or "")
    revision = str(setting_at(llm_args, "revision", "") or "")
    if os.path.isdir(model):
        revision = revision or model_fingerprint(model)
        model = os.path.basename(os.path.normpath(model))
    return Engine(
        socket=socket_of(setting_at(llm_args, "kv_connector_config.server_url")),
        client=f"tensorrt_llm rank {rank}",
        model=model,
        revision=revision,
        kv_dtype=str(setting_at(llm_args, "kv_cache_config.dtype", "auto")),
        tokens_per_block=int(setting_at(llm_args, "kv_cache_config.tokens_per_block", 32)),
        rank=rank,
        rank_count=rank_count,
        shard=rank,
        shard_count=rank_count,
        # Numbers of adapters are this engine's own, unless the operator says otherwise.
        lora_scope=uuid.uuid4().hex,
    )


def _backend(llm_args: Any) -> str:
    return str(setting_at(llm_args, "attn_backend", "TRTLLM"))


def register_tensor(engine: Engine, llm_args: Any, tensor: Any) -> Callable[[], int]:
    """Registers a flat pool: one block after the other. Returns what tells the current stream."""
    blocks = int(tensor.shape[0])
    block_bytes = tensor.numel() * tensor.element_size() // blocks
    shape = "x".join(str(size) for size in tensor.shape[1:])
    layout = f"trtllm flat {shape} {tensor.dtype} {_backend(llm_args)}"
    groups = [[(tensor.data_ptr(), block_bytes, block_bytes, blocks)]]
    # One vector per token for all heads: every rank has all of it.
    replicated = int(tensor.shape[2]) == 1
    memfd = getattr(tensor, "memfd", None)
    return _register(engine, groups, layout, tensor.device, tensor, [memfd], replicated=replicated)


def register_layout(engine: Engine, llm_args: Any, layout: Any) -> Callable[[], int]:
    """Registers layer groups, each with numbers of its own."""
    said = int(setting_at(llm_args, "kv_cache_config.tokens_per_block", 32))
    if layout.tokens_per_block != said:
        raise NotImplementedError(
            f"kvbm_connector: kv_cache_config.tokens_per_block is {said}: the engine uses blocks of "
            f"{layout.tokens_per_block} tokens; set it to that"
        )
    groups, names, memfds = [], [], []
    device: Any = "cpu"
    for group in layout.groups:
        regions = [*group.regions, *(getattr(group, "replicated_regions", None) or [])]
        groups.append([(region.base, region.size, region.stride, region.num_slots) for region in regions])
        memfds += [getattr(region, "memfd", None) for region in regions]
        buffers = ";".join(
            ",".join(f"{buffer.layer_id} {buffer.role} {getattr(buffer, 'expansion', 1)}" for buffer in region.buffers)
            for region in regions
        )
        names.append(f"[{group.window_size} {[region.size for region in regions]} {buffers}]")
        device = getattr(regions[0].as_tensor(), "device", "cpu")
    windowed = any(group.window_size is not None for group in layout.groups)
    named = f"trtllm groups {''.join(names)} {_backend(llm_args)}"
    return _register(engine, groups, named, device, layout, memfds, windowed=windowed, size_is_known=True)


def _register(
    engine: Engine,
    groups: Any,
    layout: str,
    device: Any,
    owner: Any,
    memfds: list[Any],
    *,
    replicated: bool = False,
    windowed: bool = False,
    size_is_known: bool = False,
) -> Callable[[], int]:
    if getattr(device, "type", "cpu") != "cuda":
        exported = None if None in memfds else memfds
        engine.register_memory(groups, layout, "cpu:0", replicated, windowed, size_is_known, owner, exported)
        return lambda: 0
    # An engine with memory on a GPU has brought torch.
    import torch

    index = device.index if device.index is not None else torch.cuda.current_device()
    engine.register_cuda_memory(groups, layout, index, replicated, windowed, size_is_known, owner)
    return lambda: int(torch.cuda.current_stream(index).cuda_stream)
