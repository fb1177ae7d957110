"""A daemon that can be killed, stopped, slowed down and started again."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

FAULTS = ("kill", "stop", "slow", "restart")
SLOW_CALL_S = 1.0
"""A slow daemon stands still for so long and then runs for a moment."""
MOMENT_S = 0.01
START_S = 30.0


class Daemon:
    """`command` has {socket}, {state} and {python} in it."""

    def __init__(self, command: str, directory: str) -> None:
        self.socket = f"{directory}/daemon.sock"
        self.state = f"{directory}/state"
        Path(self.state).mkdir(exist_ok=True)
        self.log = f"{directory}/daemon.log"
        self._command = shlex.split(command.format(socket=self.socket, state=self.state, python=sys.executable))
        self._process: subprocess.Popen[bytes] | None = None
        self._slow: threading.Event | None = None
        self._over = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Until it takes connections."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the daemon did not start: {Path(self.log).read_text()[-500:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.socket)
            except OSError:
                return False
        return True

    def strike(self, fault: str) -> None:
        """What happens at the chosen callback."""
        with self._lock:
            if not self._over:
                self._strike(fault)

    def _strike(self, fault: str) -> None:
        if fault in ("kill", "restart"):
            self.kill()
        if fault == "restart":
            self.start()
        if fault == "stop":
            self._signal(signal.SIGSTOP)
        if fault == "slow":
            self._slow = threading.Event()
            threading.Thread(target=self._crawl, args=(self._slow,), daemon=True).start()

    def _crawl(self, healed: threading.Event) -> None:
        while not healed.is_set():
            self._signal(signal.SIGSTOP)
            healed.wait(SLOW_CALL_S)
            self._signal(signal.SIGCONT)
            time.sleep(MOMENT_S)

    def heal(self) -> None:
        """The daemon runs again, whatever happened to it, and nothing happens to it any more."""
        with self._lock:
            self._over = True
            self._heal()

    def _heal(self) -> None:
        if self._slow is not None:
            self._slow.set()
            self._slow = None
            time.sleep(2 * MOMENT_S)
        self._signal(signal.SIGCONT)
        if self._process is None:
            self.start()

    def close(self) -> None:
        """It is killed and not started again, also by a strike that comes late."""
        with self._lock:
            self._over = True
            if self._slow is not None:
                self._slow.set()
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)
