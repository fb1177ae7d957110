"""Settings of the engine: what cannot work is refused at the start, by its name."""

from __future__ import annotations

import os
from typing import Any

from ._native import Engine, model_fingerprint

ENVIRONMENT = "KVBM_VLLM_"
_OPTIONS = (
    "endpoint",
    "model",
    "revision",
    "tenant",
    "load",
    "pool",
    "cross_layer",
    "by_layer",
    "lookup_deadline_ms",
    "detach_after_ms",
    "disk_wait_max_ms",
    "log",
)
# Kinds of memory of which every block of a sequence stays until the sequence ends.
_WHOLE = ("FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec", "TQFullAttentionSpec")


def _refuse(setting: str, value: Any, reason: str) -> None:
    raise NotImplementedError(f"kvbm_connector: {setting} is {value!r}: {reason}")


def options_of(config: Any) -> dict[str, str]:
    """Our part of `kv_connector_extra_config`. What is not ours and not the engine's own is a mistake."""
    given = dict(getattr(config.kv_transfer_config, "kv_connector_extra_config", None) or {})
    options = {name[len("kvbm.") :]: str(value) for name, value in given.items() if name.startswith("kvbm.")}
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(f"kvbm.{option}" for option in _OPTIONS)
            _refuse("kv_connector_extra_config", f"kvbm.{name}", f"there is no such option; there are {known}")
    return options


def check(config: Any, kv_cache_config: Any) -> None:
    """Refuses what this connector does not support."""
    role = config.kv_transfer_config.kv_role
    if role != "kv_both":
        _refuse("kv_role", role, "the cache is read and written by every engine; set it to kv_both")
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            _refuse(name, getattr(parallel, name), "blocks are spread in a way that has no key; set it to 1")
    if kv_cache_config is not None:
        block_spec(kv_cache_config)
    # A load that fails costs time, never a request. The scheduler reads this when its connector is made.
    if hasattr(config.kv_transfer_config, "kv_load_failure_policy"):
        config.kv_transfer_config.kv_load_failure_policy = "recompute"


def block_spec(kv_cache_config: Any) -> Any:
    """The one kind of block that the engine has."""
    groups = kv_cache_config.kv_cache_groups
    names = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1:
        _refuse(
            "the model's KV cache",
            names,
            "hybrid models, whose layers have blocks of several kinds, are not supported yet",
        )
    spec = groups[0].kv_cache_spec
    inner = getattr(spec, "kv_cache_specs", None)
    kinds = {type(kind).__name__ for kind in (inner.values() if isinstance(inner, dict) else [spec])}
    if not kinds <= set(_WHOLE):
        _refuse(
            "the model's KV cache",
            sorted(kinds),
            "of these the engine keeps no whole prefix; full attention is supported",
        )
    return spec


def layer_names(kv_cache_config: Any) -> list[str]:
    """Of the engine's KV memory, in the order in which they lie there where one tensor has all of them."""
    names: list[str] = []
    for tensor in getattr(kv_cache_config, "kv_cache_tensors", ()):
        # Where each layer has a tensor, others may use it too.
        names.extend(getattr(tensor, "layers", None) or tensor.shared_by[:1])
    return names


def is_replicated(spec: Any) -> bool:
    """True if every rank has the same bytes: one vector per token for all heads."""
    inner = getattr(spec, "kv_cache_specs", None)
    kinds = inner.values() if isinstance(inner, dict) else [spec]
    return all("MLA" in type(kind).__name__ for kind in kinds)


def prefers_cross_layer(config: Any) -> bool:
    """Whether the engine is asked for blocks whose layers lie together; only some versions and backends have them."""
    wanted = options_of(config).get("cross_layer", "true").lower()
    if wanted not in ("true", "false"):
        _refuse("kv_connector_extra_config", f"kvbm.cross_layer {wanted}", "expected true or false")
    return wanted == "true"


def waits_for_layers(config: Any, device: str) -> bool:
    """Whether passes may begin before all layers have arrived. On a CPU only if that is asked for: there the copies and
    the pass share the cores. A draft model reads outside of what its hooks show."""
    if getattr(config, "speculative_config", None) is not None:
        return False
    wanted = options_of(config).get("by_layer") or os.environ.get(f"{ENVIRONMENT}BY_LAYER")
    return wanted.lower() == "true" if wanted else device == "cuda"


def load_options(config: Any) -> dict[str, str]:
    """Our options, with what the engine's way of scheduling leaves of `kvbm.load`."""
    options = options_of(config)
    if getattr(getattr(config, "scheduler_config", None), "async_scheduling", None):
        # A pass is scheduled before the one before it has said which of its loads failed; of parked loads none is in one.
        load = options.get("load") or os.environ.get(f"{ENVIRONMENT}LOAD") or "auto"
        if load == "in-pass":
            _refuse("kvbm.load", load, "with asynchronous scheduling it is parked; or set --no-async-scheduling")
        options["load"] = "parked" if load == "auto" else load
    return options


def make_engine(config: Any, kv_cache_config: Any, rank: int, half: str) -> Engine:
    """The native module's part of one process."""
    model = str(config.model_config.model)
    revision = str(getattr(config.model_config, "revision", None) or "")
    if os.path.isdir(model):
        revision = revision or model_fingerprint(model)
        model = os.path.basename(os.path.normpath(model))
    spec = block_spec(kv_cache_config)
    cache_dtype = str(config.cache_config.cache_dtype)
    return Engine.apart(
        client=f"vllm {half} {rank}",
        engine=str(config.kv_transfer_config.engine_id),
        model=model,
        revision=revision,
        # Numbers depend on what the model computes in, not only on what is kept.
        kv_dtype=f"{cache_dtype} of {config.model_config.dtype}",
        tokens_per_block=int(spec.block_size),
        rank=rank,
        rank_count=int(config.parallel_config.tensor_parallel_size),
        options=load_options(config),
        prefix=ENVIRONMENT,
    )
