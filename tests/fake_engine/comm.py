"""The collectives between ranks: a star of pipes around rank 0. Everything is pickled, also with one rank."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


class Comm:
    """Rank 0 has a pipe to each other rank, the others have one to rank 0."""

    def __init__(self, rank: int, size: int, pipes: list[Connection]) -> None:
        self.rank = rank
        self.size = size
        self._pipes = pipes

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gives, on every rank. An object that cannot be pickled raises on rank 0."""
        if self.rank != 0:
            return pickle.loads(self._pipes[0].recv_bytes())
        data = pickle.dumps(value)
        for pipe in self._pipes:
            pipe.send_bytes(data)
        return pickle.loads(data)

    def allgather(self, value: T) -> list[T]:
        """What each rank gives, in rank order, on every rank."""
        if self.rank != 0:
            self._pipes[0].send_bytes(pickle.dumps(value))
            gathered: list[T] = pickle.loads(self._pipes[0].recv_bytes())
            return gathered
        values = [pickle.loads(pickle.dumps(value))] + [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes]
        data = pickle.dumps(values)
        for pipe in self._pipes:
            pipe.send_bytes(data)
        return values
