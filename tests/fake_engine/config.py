"""How one fake engine is set up."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import llm_args
from .geometry import Geometry, flat, layered


@dataclass(frozen=True)
class ConnectorNames:
    module: str
    scheduler_class: str
    worker_class: str
    server_url: str | None = None


@dataclass(frozen=True)
class EngineConfig:
    connector: ConnectorNames
    api: str = "L1"
    import_path: str = "old"
    early: bool = False
    overlap: bool = False
    ranks: int = 1
    device: str = "cpu"
    pages: int = 48
    tokens_per_block: int = 8
    tokens_per_block_told: int | None = None
    """What `llm_args` says, where that is not what is registered."""
    layers: int = 2
    kv_factor: int = 2
    window: int | None = None
    """L2: a second layer group with a sliding window of so many tokens."""
    chunk_tokens: int | None = None
    """Chunked prefill: prompt tokens per pass and request."""
    max_num_tokens: int = 8192
    max_batch_size: int = 256
    block_reuse: bool = True
    partial_reuse: bool = False
    graphs: bool = False
    """CUDA graphs: passes that only decode call no per-layer hook."""
    max_utilization: bool = False
    """L2: admits more than can be finished, and takes blocks back from the youngest request."""
    short_commit: bool = False
    """L2: takes less of some offers."""
    empty_metadata: bool = False
    """Binds None and empty bytes before the real metadata."""
    free_order: str = "lifo"
    seed: int = 0
    watched: bool = False
    """Threads of the rank's process read the figures of connectors that have some, all the while."""
    verify: bool = True
    patience_s: float = 20.0
    """How long a request may take."""
    model: str = "fake/model"
    model_options: dict[str, object] = field(default_factory=dict)
    """Overrides of `LlmArgs`, for set-ups that have to be refused."""

    def geometry(self) -> Geometry:
        if self.api == "L1":
            return flat(self.pages, self.tokens_per_block, self.layers, self.kv_factor)
        return layered(self.pages, self.tokens_per_block, self.window, self.kv_factor)

    def llm_args(self, rank: int) -> llm_args.LlmArgs:
        cache = llm_args.KvCacheConfig(
            tokens_per_block=self.tokens_per_block_told or self.tokens_per_block,
            enable_block_reuse=self.block_reuse,
            enable_partial_reuse=self.partial_reuse,
            max_attention_window=[self.window] if self.window else None,
            use_kv_cache_manager_v2=self.api == "L2",
        )
        args = llm_args.LlmArgs(
            model=self.model,
            kv_cache_config=cache,
            parallel_config=llm_args.ParallelConfig(
                llm_args.Mapping(rank=rank, world_size=self.ranks, tp_size=self.ranks, tp_rank=rank)
            ),
            kv_connector_config=llm_args.KvCacheConnectorConfig(
                self.connector.module,
                self.connector.scheduler_class,
                self.connector.worker_class,
                server_url=self.connector.server_url,
            ),
            max_num_tokens=self.max_num_tokens,
            max_batch_size=self.max_batch_size,
            enable_chunked_prefill=self.chunk_tokens is not None,
            disable_overlap_scheduler=not self.overlap,
        )
        for name, value in self.model_options.items():
            target, _, attribute = name.rpartition(".")
            setattr(_attribute(args, target), attribute, value)
        return args


def _attribute(value: object, path: str) -> object:
    for name in filter(None, path.split(".")):
        value = getattr(value, name)
    return value
