"""The reference connectors' cache: a directory with one file per key, layer group and rank, shared by processes.

Its settings are a URL, `dir:/path?capacity=64&load_ms=5&save_ms=5`: so many blocks are kept, a block's load and save
take at least so long. A lease keeps blocks from eviction; those of dead processes do not count.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlparse


class DirectoryStore:
    def __init__(self, url: str, ranks: int) -> None:
        parsed = urlparse(url)
        settings = parse_qs(parsed.query)
        self.ranks = ranks
        self.path = Path(parsed.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.capacity = int(settings["capacity"][0]) if "capacity" in settings else None
        self.load_s = float(settings.get("load_ms", ["0"])[0]) / 1e3
        self.save_s = float(settings.get("save_ms", ["0"])[0]) / 1e3
        self._leases = 0

    def look_up(self, keys: list[str], groups: int) -> None:
        """Told before a query what it will ask for."""

    def has(self, key: str, group: int) -> bool:
        """All ranks' shards are there."""
        return all((self.path / f"{key}.{group}.{rank}").exists() for rank in range(self.ranks))

    def lease(self, keys: list[str]) -> str:
        """The blocks stay until the lease is let go. Taken under the lock that eviction takes."""
        self._leases += 1
        lease = f"{os.getpid()}-{id(self)}-{self._leases}"
        with self._locked():
            for key in keys:
                (self.path / f"{key}.pin.{lease}").touch()
        return lease

    def release(self, lease: str) -> None:
        """What there was no room for while it was held goes at once."""
        with self._locked():
            for pin in self.path.glob(f"*.pin.{lease}"):
                pin.unlink(missing_ok=True)
            self._evict()

    def get(self, key: str, group: int, rank: int) -> bytes | None:
        try:
            return (self.path / f"{key}.{group}.{rank}").read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, group: int, rank: int, data: bytes, priority: int) -> None:
        """Whole or not at all."""
        target = self.path / f"{key}.{group}.{rank}"
        if target.exists():
            return
        part = self.path / f"part.{os.getpid()}.{key}.{group}.{rank}"
        part.write_bytes(data)
        with self._locked():
            if not any((self.path / f"{key}.{group}.{other}").exists() for other in range(self.ranks)):
                (self.path / f"{key}.order.{priority:03}").touch()
            part.rename(target)
            self._evict()

    def _evict(self) -> None:
        """Lowest priority first, then the oldest."""
        if self.capacity is None:
            return
        with os.scandir(self.path) as entries:
            names = [(entry.name, entry) for entry in entries]
        orders = [(name.split(".")[2], entry.stat().st_mtime_ns, name) for name, entry in names if ".order." in name]
        pinned = {name.split(".")[0] for name, _ in names if ".pin." in name and _alive(name.split(".pin.")[1])}
        for _, _, name in sorted(orders)[: max(0, len(orders) - self.capacity)]:
            key = name.split(".")[0]
            if key not in pinned:
                for file in self.path.glob(f"{key}.*"):
                    file.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _alive(lease: str) -> bool:
    """The process that took the lease."""
    return Path(f"/proc/{lease.split('-')[0]}").exists()
