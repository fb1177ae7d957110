"""An engine that tests start, ask and end, also without a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Engine:
    """A vLLM engine in a process of its own. `connector` is a class of `recorded.py`."""

    def __init__(self, folder: Path, model: Path, connector: str, extra: dict[str, Any] | None = None) -> None:
        address = str(folder / f"engine-{time.monotonic_ns()}.sock")
        python_path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log = folder / "engine.log"
        with Listener(address, "AF_UNIX") as listener, open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "engine_process.py"),
                    address,
                    str(model),
                    connector,
                    json.dumps(extra or {}),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path},
            )
            self.pipe = self._accepted(listener)

    def _accepted(self, listener: Listener) -> Connection:
        listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
        for _ in range(300):
            try:
                return listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        self.kill()
        raise AssertionError(f"the engine did not start: {self.log.read_text()[-3000:]}")

    def ask(self, what: str, *arguments: Any) -> Any:
        self.pipe.send((what, arguments))
        return self.pipe.recv()

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        result: dict[str, Any] = self.ask("generate", [prompt], count)[0]
        return result

    def attached(self) -> bool:
        figures = self.ask("figures")
        return all(half["attached"] for half in figures.values())

    def kill(self) -> None:
        """Ends all its processes with -9."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
