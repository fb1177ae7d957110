from os import PathLike

def socket_of(address: str | None = None) -> str: ...
def model_fingerprint(folder: str | PathLike[str]) -> str: ...

# (id, tokens, pages by layer group, computed, scheduled, priorities)
# Tokens are 32-bit words, little endian; None: they are no such words.
_Report = tuple[int, bytes | None, list[list[int]], int, int | None, list[int] | None]

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
    def register_memory(
        self,
        groups: list[list[tuple[int, int, int, int]]],
        layout: str,
        device: str,
        replicated: bool,
        windowed: bool,
        size_is_known: bool,
        owner: object,
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
    ) -> None: ...
    @property
    def attached(self) -> bool: ...
    def query(
        self,
        id: int,
        tokens: bytes,
        lora: int | None,
        salt: str | None,
        items: list[tuple[bytes, int, int]],
        cacheable: bool,
        local_tokens: int,
    ) -> tuple[int, bool]: ...
    def allocated(self, id: int, pages: list[list[int]]) -> None: ...
    def build(self, new: list[_Report], cached: list[_Report]) -> bytes: ...
    def request_finished(self, id: int) -> bool: ...
    def bind(self, metadata: bytes) -> None: ...
    def start_loads(self, stream: int) -> None: ...
    def pass_done(self, stream: int) -> None: ...
    def get_finished(self, saving: list[int], loading: list[int]) -> tuple[list[int], list[int]]: ...
    def figures(self) -> dict[str, int | str | None]: ...
    def close(self) -> None: ...
