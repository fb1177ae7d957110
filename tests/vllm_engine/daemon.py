"""A daemon of the node, with or without a holder of its memory, that can be killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(what: str, holds: Callable[[], bool], patience_s: float = 60) -> None:
    """Waits for something that has to come, however busy the machine is."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience_s:.0f} s for this in vain: {what}")
        time.sleep(0.02)


class Node:
    """`kvbm daemon`, and `kvbm hold` beside it."""

    def __init__(self, kvbm: Path, folder: Path, *settings: str, held: bool = True) -> None:
        self.kvbm, self.folder, self.settings = kvbm, folder, settings
        self.socket = folder / "kvbm.sock"
        self.holder: subprocess.Popen[bytes] | None = None
        self.daemon: subprocess.Popen[bytes] | None = None
        self.log = open(folder / "daemon.log", "ab")
        if held:
            self.holder = self._run("hold", "--socket", str(folder / "hold.sock"), "--grace-secs", "600")

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("KVBM_", "DYN_"))}
        environment["KVBM_STATE_DIR"] = str(self.folder)
        return subprocess.Popen([str(self.kvbm), *arguments], env=environment, stdout=self.log, stderr=self.log)

    def launch(self) -> None:
        held = ["--holder", str(self.folder / "hold.sock")] if self.holder else []
        self.daemon = self._run("daemon", "--socket", str(self.socket), "--metrics-port", "0", *held, *self.settings)

    def start(self) -> None:
        self.launch()
        wait_until("the daemon answers", lambda: self.status() is not None)

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def stop(self) -> None:
        assert self.daemon is not None
        os.kill(self.daemon.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.daemon is not None
        os.kill(self.daemon.pid, signal.SIGCONT)

    def status(self) -> dict[str, Any] | None:
        command = [str(self.kvbm), "status", "--json", "--socket", str(self.socket)]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def host_blocks(self) -> int:
        """Blocks that are complete in host memory, and of no interest to anybody just now."""
        return self.blocks("host")

    def blocks(self, name: str) -> int:
        """The same of any tier."""
        status = self.status()
        if status is None:
            return -1
        return int(next(tier["slots"]["resident"] for tier in status["tiers"] if tier["tier"] == name))

    def close(self) -> None:
        for process in (self.daemon, self.holder):
            if process is not None:
                process.kill()
                process.wait()
        self.log.close()
