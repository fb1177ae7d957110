"""Set-ups that cannot work are refused at the start, by the name of the setting."""

from __future__ import annotations

import json
import os
from typing import Any


def _refuse(setting: str, value: Any, reason: str) -> None:
    raise NotImplementedError(f"kvbm_connector: {setting} is {value!r}: {reason}")


def setting_at(llm_args: Any, path: str, default: Any = None) -> Any:
    for name in path.split("."):
        llm_args = getattr(llm_args, name, None)
        if llm_args is None:
            return default
    return llm_args


def check_llm_args(llm_args: Any) -> None:
    """Refuses what the connector interface, or this connector, does not support."""
    backend = setting_at(llm_args, "backend", "pytorch")
    if backend not in ("pytorch", "_autodeploy"):
        _refuse("backend", backend, "connectors exist in the PyTorch backend only")
    for setting, name in (("pipeline_parallel_size", "stages"), ("context_parallel_size", "ranks")):
        if (setting_at(llm_args, setting) or 1) > 1:
            _refuse(setting, setting_at(llm_args, setting), f"blocks are spread over {name} in a way that has no key; set it to 1")
    if setting_at(llm_args, "enable_attention_dp", False):
        _refuse("enable_attention_dp", True, "ranks with blocks of their own are not supported; set it to false")
    if (setting_at(llm_args, "max_beam_width") or 1) > 1:
        _refuse("max_beam_width", setting_at(llm_args, "max_beam_width"), "beams share blocks; set it to 1")
    if (setting_at(llm_args, "kv_cache_config.host_cache_size") or 0) > 0:
        size = setting_at(llm_args, "kv_cache_config.host_cache_size")
        _refuse("kv_cache_config.host_cache_size", size, "the engine would move blocks under the connector; set it to 0")
    dtype = str(setting_at(llm_args, "kv_cache_config.dtype", "auto")).lower()
    if "nvfp4" in dtype:
        _refuse("kv_cache_config.dtype", dtype, "its block scales are in memory that connectors are not given")
    if setting_at(llm_args, "sparse_attention_config") is not None:
        _refuse("sparse_attention_config", "set", "its index blocks are in memory that connectors are not given")


def model_config(llm_args: Any) -> dict[str, Any]:
    """The model's config.json, if it is on this disk."""
    folder = os.fspath(setting_at(llm_args, "model", "") or "")
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def check_pool(llm_args: Any, tensor: Any) -> None:
    """Compares a flat pool with the settings and with the model, as far as the model is known here."""
    windows = set(setting_at(llm_args, "kv_cache_config.max_attention_window") or [])
    if len(windows) > 1:
        _refuse("kv_cache_config.max_attention_window", sorted(windows), "several windows need the engine's cache manager V2")
    if len(tensor.shape) < 3 or not tensor.is_contiguous():
        _refuse("the KV pool", tuple(tensor.shape), "expected a contiguous [blocks, layers, K and V, elements]")
    dtype, wanted = str(tensor.dtype), str(setting_at(llm_args, "kv_cache_config.dtype", "auto")).lower()
    if dtype.endswith("int8") and not dtype.endswith("uint8") and wanted != "int8":
        _refuse("kv_cache_config.dtype", wanted, "the pool is a container of NVFP4, whose scales connectors are not given")
    config = model_config(llm_args)
    _check_layers(config, tensor)
    _check_tokens(llm_args, config, tensor)


def _check_layers(config: dict[str, Any], tensor: Any) -> None:
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and tensor.shape[1] < layers:
        _refuse(
            "the KV pool",
            tuple(tensor.shape),
            f"the model has {layers} layers; those of other shapes are in memory that connectors are not given",
        )


def _check_tokens(llm_args: Any, config: dict[str, Any], tensor: Any) -> None:
    """Some attention kernels use other blocks than the settings say: then keys would lie."""
    said = setting_at(llm_args, "kv_cache_config.tokens_per_block", 32)
    elements = 1
    for size in tensor.shape[3:]:
        elements *= size
    per_token = _elements_per_token(llm_args, config, int(tensor.shape[2])) if len(tensor.shape) > 3 else None
    if per_token and elements % per_token == 0 and elements // per_token != said:
        _refuse("kv_cache_config.tokens_per_block", said, f"the engine uses blocks of {elements // per_token} tokens; set it to that")


def _elements_per_token(llm_args: Any, config: dict[str, Any], kv_factor: int) -> int | None:
    if kv_factor == 1:
        latent = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim"))
        return sum(latent) if all(isinstance(size, int) for size in latent) else None
    heads, ranks = config.get("num_key_value_heads"), setting_at(llm_args, "tensor_parallel_size") or 1
    dim = config.get("head_dim")
    if dim is None and config.get("hidden_size") and config.get("num_attention_heads"):
        dim = config["hidden_size"] // config["num_attention_heads"]
    if not isinstance(heads, int) or not isinstance(dim, int):
        return None
    return max(heads // ranks, 1) * dim
