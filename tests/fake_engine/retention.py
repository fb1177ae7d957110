"""Retention priorities of a request, block by block, as TensorRT-LLM computes them."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PRIORITY = 35


@dataclass(frozen=True)
class TokenRange:
    """Priority of tokens [start, end); `end` None is the end of the prompt. `duration` in engine time units."""

    start: int
    end: int | None
    priority: int
    duration: float | None = None


@dataclass(frozen=True)
class Retention:
    ranges: tuple[TokenRange, ...] = ()
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration: float | None = None

    def __post_init__(self) -> None:
        last_end: int | None = 0
        for token_range in sorted(self.ranges, key=lambda item: item.start):
            if not 0 <= token_range.priority <= 100:
                raise ValueError("a priority is 0 to 100")
            if token_range.start < 0 or (token_range.end is not None and token_range.end <= token_range.start):
                raise ValueError("a token range is not empty and starts at 0 or later")
            if last_end is None or token_range.start < last_end:
                raise ValueError("token ranges do not overlap, and an open one is the last")
            last_end = token_range.end
        if not 0 <= self.decode_priority <= 100:
            raise ValueError("a priority is 0 to 100")

    def block(self, ordinal: int, tokens_per_block: int, prompt_len: int) -> tuple[int | None, float | None]:
        """(priority, duration) of a block: the range with its first token, or decode's where that is generated."""
        first = ordinal * tokens_per_block
        if first >= prompt_len:
            return self.decode_priority, self.decode_duration
        for token_range in self.ranges:
            if token_range.start <= first and (token_range.end is None or first < token_range.end):
                return token_range.priority, token_range.duration
        return None, None
