"""The engine's requests, as the native module takes them."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from typing import Any

from ._native import model_fingerprint, pack_tokens

# (tokens, or None: not all of it is in the key; name of the adapter, salt, items)
Prompt = tuple[bytes | None, str | None, str | None, list[tuple[bytes, int, int]]]

# Adapters that have no files here mean something to this engine only.
_SCOPE = uuid.uuid4().hex
_adapters: dict[str, str] = {}


def prompt_of(request: Any) -> Prompt:
    """What is in the key of a request's blocks."""
    items = _items(getattr(request, "mm_features", None) or [])
    # Sessions that are fed while they run change tokens that were told; who wants something of each token of the prompt
    # has it computed.
    opaque = getattr(request, "prompt_embeds", None) is not None or any(
        getattr(request, name, False) for name in ("resumable", "skip_reading_prefix_cache")
    )
    tokens = None if opaque or items is None else pack_tokens(list(request.all_token_ids))
    return tokens, _adapter(getattr(request, "lora_request", None)), request.cache_salt, items or []


def _items(features: Iterable[Any]) -> list[tuple[bytes, int, int]] | None:
    """Multimodal items with the digest of what identifies their content; None if one has no identity."""
    items = []
    for feature in features:
        identity, place = feature.identifier, feature.mm_position
        if not identity or place.length < 1:
            return None
        digest = hashlib.sha256(f"{feature.modality} {identity}".encode()).digest()
        items.append((digest, int(place.offset), int(place.length)))
    return items


def _adapter(lora: Any) -> str | None:
    """A name that tells an adapter's weights from all others, so that engines find each other's blocks."""
    if lora is None:
        return None
    key = f"{lora.lora_int_id} {lora.lora_name} {lora.lora_path}"
    if getattr(lora, "load_inplace", False) or key not in _adapters:
        files = lora.lora_path and os.path.isdir(lora.lora_path)
        _adapters[key] = f"{lora.lora_name} {model_fingerprint(lora.lora_path)}" if files else f"{key}@{_SCOPE}"
    return _adapters[key]
