"""The engine's requests, as the native module takes them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

# Inputs that are in no key: with them a request is served without the cache.
_OPAQUE = ("prompt_embedding_table", "multimodal_embedding", "mrope_rotary_cos_sin", "encoder_tokens")


_Prompt = tuple[int, Callable[[int], list[int]] | None, int | None, str | None, list[tuple[bytes, int, int]]]


def prompt_of(request: Any) -> _Prompt:
    """`(id, what gives the tokens or None: not all is in the key, LoRA number, salt, multimodal items)`"""
    items = _items(request)
    opaque = items is None or _is_opaque(request, bool(items))
    lora = getattr(request, "lora_task_id", None)
    return (
        request.request_id,
        None if opaque else request.get_tokens,
        None if lora is None else int(lora),
        _salt(request),
        items or [],
    )


def report_of(data: Any) -> tuple[int, int, list[int], list[list[int]], int, int | None, list[int] | None]:
    """`(id, 0, tokens, pages by layer group, computed, scheduled, priorities)`: all tokens are told."""
    groups = getattr(data, "new_block_ids_by_layer_group", None)
    if isinstance(groups, dict):
        groups = [groups[key] for key in sorted(groups)]
    return (
        data.request_id,
        0,
        data.new_tokens,
        groups or [data.new_block_ids],
        data.computed_position,
        getattr(data, "num_scheduled_tokens", None),
        getattr(data, "priorities", None),
    )


def _salt(request: Any) -> str | None:
    salt = getattr(request, "cache_salt", None)
    if salt is not None:
        return str(salt)
    number = getattr(request, "cache_salt_id", None)
    return None if number is None else f"number {number}"


def _items(request: Any) -> list[tuple[bytes, int, int]] | None:
    """Multimodal items; None if there are some without a digest."""
    positions = getattr(request, "multimodal_positions", None) or []
    lengths = getattr(request, "multimodal_lengths", None) or []
    hashes = getattr(request, "multimodal_hashes", None) or []
    if not (len(positions) == len(lengths) == len(hashes)):
        return None
    items = []
    for digest, start, length in zip(hashes, positions, lengths):
        if len(digest) != 8 or start < 0 or length < 1:
            return None
        items.append((struct.pack("<8I", *(word & 0xFFFFFFFF for word in digest)), int(start), int(length)))
    return items


def _is_opaque(request: Any, has_items: bool) -> bool:
    if _flag(request, "is_dummy_request") or _flag(request, "is_generation_only_request"):
        return True
    return any(getattr(request, name, None) is not None for name in _OPAQUE if not (has_items and name != "encoder_tokens"))


def _flag(request: Any, name: str) -> bool:
    # An attribute in one version, a method in another.
    value = getattr(request, name, False)
    return bool(value() if callable(value) else value)
