"""A request: what a client asks, what the engine knows, and the two views of it that a connector is shown."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from .content import Digests
from .retention import Retention


@dataclass(frozen=True)
class MultimodalItem:
    """An image or a sound in the prompt; `digest` has 8 words of 32 bits. `hashed`: the engine was given the digest."""

    digest: tuple[int, ...]
    position: int
    length: int
    hashed: bool = True


@dataclass(frozen=True)
class RequestSpec:
    """What a client asks for."""

    request_id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_after: int | None = None
    cache_salt: str | None = None
    lora_task_id: int | None = None
    multimodal: tuple[MultimodalItem, ...] = ()
    retention: Retention | None = None
    context_only: bool = False
    generation_only: bool = False
    draft_tokens: int = 0


class State(enum.Enum):
    """Where a request is. Its life: WAITING, CONTEXT, (PARKED, CONTEXT,) GENERATION, then one of the last four."""

    WAITING = "waiting"
    CONTEXT = "context"
    PARKED = "parked"
    GENERATION = "generation"
    TO_COMPLETE = "to complete"
    FINISHED = "finished"
    SAVING = "saving"
    COMPLETE = "complete"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class EngineRequest:
    """What the engine knows. Every rank holds its own copy and all are equal."""

    spec: RequestSpec
    digests: Digests
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    """What the host has seen: the prompt and every token whose pass was processed."""
    device_tokens: list[int] = field(default_factory=list)
    """What the device has: under the overlap scheduler one pass ahead of `tokens`."""
    prompt_len: int = 0
    position: int = 0
    """Prompt tokens whose KV is there, while the prompt is computed."""
    kv_len: int = 0
    """Tokens whose KV is there and right."""
    chunk: int = 0
    first_chunk: bool = True
    matched_by_connector: int = 0
    local_match: int = 0
    pages: list[list[int]] = field(default_factory=list)
    """Per layer group, one page per block of the sequence, -1 where the window has passed."""
    offered: int = 0
    """Tokens that the connector offered; `matched_by_connector` is what was taken of them."""
    loads_asynchronously: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.spec.prompt)
        self.device_tokens = list(self.spec.prompt)
        self.prompt_len = len(self.spec.prompt)

    @property
    def request_id(self) -> int:
        return self.spec.request_id

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def remaining_prompt(self) -> int:
        return self.prompt_len - self.position

    @property
    def is_finished(self) -> bool:
        return self.state in (State.FINISHED, State.SAVING, State.COMPLETE)

    @property
    def holds_blocks(self) -> bool:
        return bool(self.pages)


def numbers(tokens: list[int]) -> array[int]:
    """Tokens where Python's numbers are made of them, as in C++."""
    return array("q", tokens)


class BaseLlmRequest:
    """What the C++ object shows: made anew for each query, nothing settable, no `py_` names."""

    def __init__(self, request: EngineRequest, early: bool = False) -> None:
        spec = request.spec
        self.request_id = spec.request_id
        self.prompt_len = request.prompt_len
        self.orig_prompt_len = len(spec.prompt)
        self.max_new_tokens = spec.max_new_tokens
        self.context_current_position = request.position
        self.context_chunk_size = request.chunk
        self.context_remaining_length = request.remaining_prompt
        self.prepopulated_prompt_len = request.local_match + request.matched_by_connector
        self.is_first_context_chunk = request.first_chunk
        self.is_last_context_chunk = request.position + request.chunk >= request.prompt_len
        self.state = request.state.value
        self.is_finished = request.is_finished
        self.is_finished_due_to_length = request.is_finished and request.generated >= spec.max_new_tokens
        self.lora_task_id = spec.lora_task_id
        if early:
            self.cache_salt_id = _salt_number(spec.cache_salt)
        else:
            self.cache_salt = spec.cache_salt
        items = spec.multimodal
        self.multimodal_positions = [item.position for item in items] or None
        self.multimodal_lengths = [item.length for item in items] or None
        hashed = bool(items) and all(item.hashed for item in items)
        self.multimodal_hashes = [list(item.digest) for item in items] if hashed else None
        self.is_dummy_request = False
        self.is_context_only_request = spec.context_only
        self.is_generation_only_request = spec.generation_only
        self.parent_request_id = None
        self.is_child = False
        self.seq_slot = 0
        self.end_id = -1
        self._tokens = numbers(request.tokens)

    def get_tokens(self, beam: int) -> list[int]:
        if beam != 0:
            raise IndexError("one beam")
        # A list of its own, of numbers of its own: the real ones are made from a C++ vector each time.
        return self._tokens.tolist()

    def priority(self) -> float:
        """The scheduling priority, which is not the retention priority."""
        return 0.5


class LlmRequest(BaseLlmRequest):
    """The Python object, a different one than the query saw."""

    def __init__(self, request: EngineRequest, early: bool = False) -> None:
        super().__init__(request, early)
        self.py_request_id = self.request_id
        self.py_num_connector_matched_tokens = request.matched_by_connector
        self.num_connector_matched_tokens = request.matched_by_connector


def _salt_number(salt: str | None) -> int | None:
    """First releases carried a number for the salt."""
    if salt is None:
        return None
    return int.from_bytes(salt.encode().ljust(8, b"\0")[:8], "little")
