"""Scheduler half of the reference connector: plain, slow, and right."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from .directory_store import DirectoryStore


@dataclass(frozen=True)
class Load:
    """Blocks to bring in: (key, ordinal, page per layer group)."""

    request_id: int
    blocks: list[tuple[str, int, list[int]]]
    asynchronous: bool
    lease: str


@dataclass(frozen=True)
class Save:
    request_id: int
    blocks: list[tuple[str, int, list[int]]]
    priorities: list[int]


@dataclass
class Metadata:
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    allocated: list[list[int]] = field(default_factory=list)
    """Pages per layer group that have new owners, which will write them."""


@dataclass
class Known:
    """What is known of a request."""

    scope: bytes
    items: list[tuple[Any, int, int]]
    bypass: bool = False
    tokens: list[int] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    local_blocks: int = 0
    offered_blocks: int = 0
    rolled_back: int = 0
    """Tokens of a synchronous load, by which the first report's position is too small."""
    lease: str = ""
    asynchronous: bool = True
    saved_blocks: int = 0
    any_saved: bool = False
    ended: bool = False


class ReferenceScheduler:
    KEEPS_BLOCKS = True
    """Whether blocks of ended requests are held until they are saved, or given up with a generation check."""
    ASYNCHRONOUS = True

    def __init__(self, llm_args: Any) -> None:
        self.args = llm_args
        self.store = self.make_store(llm_args.kv_connector_config.server_url, llm_args.tensor_parallel_size)
        self.size: int = llm_args.kv_cache_config.tokens_per_block
        windows = llm_args.kv_cache_config.max_attention_window
        self.windows: list[int | None] = [None, *windows] if windows else [None]
        self.known: dict[int, Known] = {}
        self.metadata = Metadata()
        self.trusted = True

    def make_store(self, url: str, ranks: int) -> DirectoryStore:
        return DirectoryStore(url, ranks)

    # Keys.

    def scope(self, request: Any) -> bytes:
        salt = getattr(request, "cache_salt", getattr(request, "cache_salt_id", None))
        return repr((self.args.model, self.size, request.lora_task_id, salt)).encode()

    def items(self, request: Any) -> list[tuple[Any, int, int]]:
        hashes = request.multimodal_hashes or []
        return list(zip(hashes, request.multimodal_positions or [], request.multimodal_lengths or [], strict=True))

    def key(self, known: Known, ordinal: int) -> str:
        """Each key covers the whole prefix."""
        while len(known.keys) <= ordinal:
            number = len(known.keys)
            start, end = number * self.size, (number + 1) * self.size
            above = known.keys[-1].encode() if known.keys else known.scope
            data = b"".join(token.to_bytes(4, "little") for token in known.tokens[start:end])
            over = [repr(item).encode() for item in known.items if item[1] < end and start < item[1] + item[2]]
            known.keys.append(hashlib.blake2b(above + data + b"".join(over), digest_size=16).hexdigest())
        return known.keys[ordinal]

    # Callbacks.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        unhashed = bool(request.multimodal_positions) and not request.multimodal_hashes
        known = Known(self.scope(request), [] if unhashed else self.items(request), bypass=unhashed)
        known.tokens = request.get_tokens(0)
        known.local_blocks = num_computed_tokens // self.size
        known.asynchronous = self.ASYNCHRONOUS
        self.known[request.request_id] = known
        if unhashed or num_computed_tokens % self.size or not self.trusted:
            return 0, False
        last = self.most_blocks(request.prompt_len)
        deepest = known.local_blocks
        self.store.look_up([self.key(known, ordinal) for ordinal in range(last)], len(self.windows))
        while deepest < last and self.store.has(self.key(known, deepest), 0):
            deepest += 1
        while deepest > known.local_blocks and not self._windows_there(known, deepest):
            deepest -= 1
        blocks = range(known.local_blocks, deepest)
        if not blocks:
            return 0, False
        known.lease = self.take_lease([self.key(known, ordinal) for ordinal in blocks])
        if not all(self.store.has(self.key(known, ordinal), 0) for ordinal in blocks):
            self.store.release(known.lease)
            return 0, False
        known.offered_blocks = len(blocks)
        known.rolled_back = 0 if known.asynchronous else len(blocks) * self.size
        return len(blocks) * self.size, known.asynchronous

    def most_blocks(self, prompt_len: int) -> int:
        """One prompt token at least is left to compute."""
        return (prompt_len - 1) // self.size

    def take_lease(self, keys: list[str]) -> str:
        return self.store.lease(keys)

    def _windows_there(self, known: Known, blocks: int) -> bool:
        for group, window in enumerate(self.windows):
            for ordinal in range(max(known.local_blocks, self._first(blocks * self.size, window)), blocks):
                if not self.store.has(self.key(known, ordinal), group):
                    return False
        return True

    def _first(self, history: int, window: int | None) -> int:
        return 0 if window is None else max(0, (history + 1 - window) // self.size)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(self, request: Any, groups: list[list[int]]) -> None:
        known = self.known.get(request.request_id)
        if known is None:
            # Block reuse is off: nothing was asked.
            unhashed = bool(request.multimodal_positions) and not request.multimodal_hashes
            known = Known(self.scope(request), [] if unhashed else self.items(request), bypass=unhashed)
            self.known[request.request_id] = known
        known.pages = [list(pages) for pages in groups]
        if len(self.windows) == 1 and len(groups[0]) > -(-request.prompt_len // self.size):
            # More blocks than the prompt has: a block has fewer tokens than the arguments say. No key is right then.
            self.trusted = False
        self.note_allocated(known, known.local_blocks)
        if not known.offered_blocks:
            return
        blocks = []
        for ordinal in range(known.local_blocks, known.local_blocks + known.offered_blocks):
            pages = [group[ordinal] if ordinal < len(group) else -1 for group in groups]
            blocks.append((self.key(known, ordinal), ordinal, pages))
        self.metadata.loads.append(Load(request.request_id, blocks, known.asynchronous, known.lease))

    def note_allocated(self, known: Known, first: int) -> None:
        """Pages from block `first` on will be written by their new owner."""
        while len(self.metadata.allocated) < len(known.pages):
            self.metadata.allocated.append([])
        for group, pages in enumerate(known.pages):
            self.metadata.allocated[group] += [page for page in pages[first:] if page >= 0]

    def build_connector_meta(self, scheduler_output: Any) -> object:
        for data in scheduler_output.new_requests:
            known = self.known[data.request_id]
            known.tokens, known.pages = [], []
            self._take(known, data, note=False)
        for data in scheduler_output.cached_requests:
            self._take(self.known[data.request_id], data, note=True)
        metadata, self.metadata = self.metadata, Metadata()
        return metadata

    def _take(self, known: Known, data: Any, note: bool) -> None:
        # A load that all ranks have ended: an asynchronous one is reported then, a synchronous one the time after.
        if known.lease and (known.asynchronous or note):
            self.store.release(known.lease)
            known.lease = ""
        known.tokens += data.new_tokens
        groups = getattr(data, "new_block_ids_by_layer_group", None) or [data.new_block_ids]
        before = len(known.pages[0]) if known.pages else 0
        known.pages = known.pages or [[] for _ in groups]
        for pages, new in zip(known.pages, groups, strict=True):
            pages += new
        known.priorities += getattr(data, "priorities", None) or [35] * len(groups[0])
        if note:
            self.note_allocated(known, before)
        start = data.computed_position + known.rolled_back
        known.rolled_back = 0
        self._save(known, data, start, self.known_good(known, start, data.num_scheduled_tokens))

    def known_good(self, known: Known, start: int, scheduled: int) -> int:
        """Tokens whose KV is there and final when this pass is over: those of drafts are not among the tokens."""
        return min(len(known.tokens), start + scheduled)

    def _save(self, known: Known, data: Any, history: int, upto: int) -> None:
        if known.bypass or not self.trusted:
            return
        blocks, priorities = [], []
        for ordinal in range(known.saved_blocks, upto // self.size):
            pages = []
            for group, window in enumerate(self.windows):
                inside = ordinal >= self._first(history, window)
                pages.append(known.pages[group][ordinal] if inside else -1)
            blocks.append((self.key(known, ordinal), ordinal, pages))
            priorities.append(known.priorities[ordinal])
        known.saved_blocks = max(known.saved_blocks, upto // self.size)
        if blocks:
            known.any_saved = True
            self.metadata.saves.append(Save(data.request_id, blocks, priorities))

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        known = self.known.get(request.request_id)
        if known is None or known.ended:
            return False
        known.ended = True
        if known.lease:
            self.store.release(known.lease)
        return known.any_saved and self.KEEPS_BLOCKS

    def request_finished_by_layer_group(self, request: Any, groups: list[list[int]]) -> bool:
        return self.request_finished(request, [])


