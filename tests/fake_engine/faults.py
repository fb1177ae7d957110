"""What can go wrong with a connector, as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """`kind` is one of the words below; `fatal`: a real engine's loop would have ended here."""

    kind: str
    detail: str
    rank: int
    iteration: int
    fatal: bool = False

    def __str__(self) -> str:
        end = ", the engine is dead" if self.fatal else ""
        return f"{self.kind} (rank {self.rank}, iteration {self.iteration}{end}): {self.detail}"


WRONG_BYTES = "wrong bytes"
"""The engine read KV that is not that of the prefix."""
BAD_LOAD = "bad load"
"""A load was reported finished and its bytes are not there."""
STRAY_WRITE = "stray write"
"""A block changed that nobody was to write."""
RAISED = "raised"
"""A callback raised."""
PROTOCOL = "protocol"
"""An answer that the executor does not take."""
TOO_SLOW = "too slow"
"""A callback held the engine's thread for longer than it may."""
EXPECTATION = "expectation"
"""A scenario did not come to what it must come to: no hit, wrong counts, a request that never ends."""


class EngineDead(Exception):
    """The executor's loop has ended."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation
