from collections.abc import Callable
from os import PathLike
from typing import Any

def socket_of(address: str | None = None) -> str: ...
def model_fingerprint(folder: str | PathLike[str]) -> str: ...

# 32-bit words, little endian; None: something among the tokens is no such word.
def pack_tokens(tokens: list[int]) -> bytes | None: ...

# (id, leading tokens known, other tokens, pages by layer group, computed, scheduled, priorities)
_Report = tuple[int, int, list[int] | None, list[list[int]], int, int | None, list[int] | None]

class Engine:
    def __init__(
        self,
        *,
        socket: str | PathLike[str],
        client: str,
        model: str,
        revision: str,
        kv_dtype: str,
        tokens_per_block: int,
        rank: int,
        rank_count: int,
        shard: int,
        shard_count: int,
        lora_scope: str,
    ) -> None: ...
    @staticmethod
    def apart(
        *,
        client: str,
        engine: str,
        model: str,
        revision: str,
        kv_dtype: str,
        tokens_per_block: int,
        rank: int,
        rank_count: int,
        options: dict[str, str],
        prefix: str,
    ) -> Engine: ...
    def join(self, layout: str, replicated: bool, block_bytes: int) -> None: ...
    def look_up(
        self,
        id: int,
        tokens: bytes | None,
        lora_name: str | None,
        salt: str | None,
        items: list[tuple[bytes, int, int]],
        local_tokens: int,
        others: int,
    ) -> tuple[int | None, bool]: ...
    def declined(self, id: int) -> None: ...
    def told(self, failed: list[int], orphaned: list[int], block_ns: int) -> None: ...
    def take_failed(self) -> list[int]: ...
    def take_block_ns(self) -> int: ...
    def wait_for_load(self) -> None: ...
    def take_orphaned(self) -> list[int]: ...
    def register_memory(
        self,
        groups: list[list[tuple[int, int, int, int]]],
        layout: str,
        device: str,
        replicated: bool,
        windowed: bool,
        size_is_known: bool,
        owner: object,
        memfds: list[tuple[int, int]] | None,
        layers: int = 1,
    ) -> None: ...
    def register_cuda_memory(
        self,
        groups: list[list[tuple[int, int, int, int]]],
        layout: str,
        device: int,
        replicated: bool,
        windowed: bool,
        size_is_known: bool,
        owner: object,
        layers: int = 1,
    ) -> None: ...
    @property
    def attached(self) -> bool: ...
    def query(
        self,
        id: int,
        get_tokens: Callable[[int], list[int]] | None,
        lora: int | None,
        salt: str | None,
        items: list[tuple[bytes, int, int]],
        local_tokens: int,
    ) -> tuple[int, bool]: ...
    def allocated(self, id: int, pages: list[list[int]]) -> None: ...
    def build(self, new: list[_Report], cached: list[_Report]) -> bytes: ...
    def request_finished(self, id: int) -> bool: ...
    def bind(self, metadata: bytes) -> None: ...
    def start_loads(self, stream: int, computes: bool = True, kind: str | None = None) -> bool: ...
    def layer(self, layer: int, stream: int) -> None: ...
    def pass_done(self, stream: int) -> None: ...
    def get_finished(self, saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]: ...
    def figures(self) -> dict[str, int | str | None]: ...
    def close(self) -> None: ...

class Worker:
    @property
    def running(self) -> int: ...
    def __init__(
        self,
        *,
        worker_id: str,
        model: str,
        model_path: str,
        role: str,
        tokens_per_block: int,
        context_length: int,
        vocab_size: int,
        eos_token_ids: list[int],
        socket: str | PathLike[str],
        daemon: str | PathLike[str],
        requests_max: int,
        base_namespace: bytes | None,
    ) -> None: ...
    def next(self, seconds: float) -> tuple[int, dict[str, Any] | None] | None: ...
    def started(self, number: int, device_tokens: int, host_tokens: int) -> bool: ...
    def tokens(self, number: int, ids: list[int]) -> bool: ...
    def finished(self, number: int, reason: str, prompt_tokens: int, completion_tokens: int) -> bool: ...
    def invalid(self, number: int, why: str) -> bool: ...
    def failed(self, number: int, why: str) -> bool: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...
