"""What KV bytes must be: a function of the whole prefix, the scope, the layer and the rank, and of nothing else.

`Digests` gives each position a 64-bit number that depends on every token up to it and on salt, LoRA and multimodal
items. `expand` turns numbers into bytes. A model of that kind makes each wrong byte visible, whichever way it came in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

VOCABULARY = int(os.environ.get("FAKE_ENGINE_VOCABULARY", "50000"))
POISON = 0xDB


class Digests:
    """One number per position of a sequence, made as tokens become known."""

    def __init__(self, cache_salt: str | None, lora_task_id: int | None, items: Sequence[Any]) -> None:
        scope = repr((cache_salt, lora_task_id)).encode()
        self._root = hashlib.blake2b(scope, digest_size=8).digest()
        self._chain: list[bytes] = []
        self._items = list(items)

    def extend(self, tokens: Sequence[int], upto: int) -> None:
        """Makes the numbers of `tokens[:upto]`."""
        for position in range(len(self._chain), upto):
            self._chain.append(self._next(self._chain[-1] if self._chain else self._root, position, tokens[position]))

    def branch(self, tokens: Sequence[int], drafts: Sequence[int]) -> Words:
        """Numbers of draft tokens that would follow `tokens`."""
        self.extend(tokens, len(tokens))
        last, numbers = self._chain[-1], []
        for offset, token in enumerate(drafts):
            last = self._next(last, len(tokens) + offset, token)
            numbers.append(last)
        return np.frombuffer(b"".join(numbers), dtype="<u8")

    def numbers(self, start: int, end: int) -> Words:
        return np.frombuffer(b"".join(self._chain[start:end]), dtype="<u8")

    def block_hash(self, end: int) -> int:
        return int.from_bytes(self._chain[end - 1], "little")

    def next_token(self, length: int) -> int:
        """The token that the model says after the first `length`."""
        return int.from_bytes(self._chain[length - 1], "little") % VOCABULARY

    def _next(self, last: bytes, position: int, token: int) -> bytes:
        data = last + token.to_bytes(4, "little")
        for item in self._items:
            if item.position <= position < item.position + item.length:
                data += b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in item.digest)
                data += (position - item.position).to_bytes(4, "little")
        return hashlib.blake2b(data, digest_size=8).digest()


@dataclass(frozen=True)
class LayerShape:
    """Bytes of one layer on one rank: [kv_factor, heads, tokens_per_block, head_bytes]."""

    layer: int
    kv_factor: int
    heads: int
    head_bytes: int
    rank: int

    def bytes_per_block(self, tokens_per_block: int) -> int:
        return self.kv_factor * self.heads * tokens_per_block * self.head_bytes


def expand(numbers: Words, shape: LayerShape) -> Bytes:
    """Bytes [positions, kv_factor, heads, head_bytes] of the positions with these numbers."""
    words = shape.head_bytes // 8
    index = np.arange(shape.kv_factor * shape.heads * words, dtype=np.uint64)
    seed = np.uint64((shape.layer * 0x9E3779B97F4A7C15 + shape.rank * 0xC2B2AE3D27D4EB4F + 1) % 2**64)
    with np.errstate(over="ignore"):
        mixed = numbers[:, None] ^ ((index + seed) * np.uint64(0xD6E8FEB86659FD93))[None, :]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    data: Bytes = mixed.view(np.uint8).reshape(len(numbers), shape.kv_factor, shape.heads, shape.head_bytes)
    return data
