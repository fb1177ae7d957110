"""The part of TensorRT-LLM's arguments that a connector may read, and the set-ups that the executor itself refuses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class KvCacheConfig:
    tokens_per_block: int = 32
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = False
    dtype: str = "auto"
    max_attention_window: list[int] | None = None
    host_cache_size: int | None = None
    disk_cache_size: int | None = None
    use_kv_cache_manager_v2: bool = False
    event_buffer_max_size: int = 0
    max_tokens: int | None = None


@dataclass
class Mapping:
    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    cp_size: int = 1
    enable_attention_dp: bool = False


@dataclass
class ParallelConfig:
    mapping: Mapping

    def to_mapping(self) -> Mapping:
        return self.mapping

    @property
    def tp_size(self) -> int:
        return self.mapping.tp_size

    @property
    def world_size(self) -> int:
        return self.mapping.world_size


@dataclass
class KvCacheConnectorConfig:
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str
    connector: str | None = None
    server_url: str | None = None


@dataclass
class SchedulerConfig:
    capacity_scheduler_policy: str = "GUARANTEED_NO_EVICT"


@dataclass
class LlmArgs:
    """Stands for TorchLlmArgs."""

    model: str
    kv_cache_config: KvCacheConfig
    parallel_config: ParallelConfig
    kv_connector_config: KvCacheConnectorConfig
    max_num_tokens: int = 8192
    max_batch_size: int = 256
    max_beam_width: int = 1
    enable_chunked_prefill: bool = False
    enable_attention_dp: bool = False
    backend: str = "pytorch"
    sparse_attention_config: object | None = None
    speculative_config: object | None = None
    disable_overlap_scheduler: bool = True
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)

    @property
    def tensor_parallel_size(self) -> int:
        return self.parallel_config.mapping.tp_size

    @property
    def pipeline_parallel_size(self) -> int:
        return self.parallel_config.mapping.pp_size

    @property
    def context_parallel_size(self) -> int:
        return self.parallel_config.mapping.cp_size


def refuse_unsupported(args: LlmArgs) -> None:
    """The checks that the executor makes before it starts with a connector."""

    def refuse(setting: str) -> None:
        raise NotImplementedError(f"KV cache connector is not supported with {setting}")

    if args.backend != "pytorch":
        raise ValueError("KV cache connector needs the PyTorch backend")
    if args.pipeline_parallel_size > 1:
        refuse("pipeline parallelism")
    if args.context_parallel_size > 1:
        refuse("context parallelism")
    if args.max_beam_width > 1:
        refuse("beam search")
    if args.enable_attention_dp:
        refuse("attention DP")
    if args.kv_cache_config.host_cache_size:
        refuse("kv_cache_config.host_cache_size")
    if args.kv_cache_config.disk_cache_size:
        refuse("kv_cache_config.disk_cache_size")
    policy = args.scheduler_config.capacity_scheduler_policy
    if not args.kv_cache_config.use_kv_cache_manager_v2 and policy != "GUARANTEED_NO_EVICT":
        refuse(f"capacity_scheduler_policy {policy}")
