"""The two that are compared: each a frontend and a worker that computes nothing, in a folder of its own."""

import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
START_SECONDS = 90
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Stack:
    """Frontend and worker. `step_ms`: pause of the worker before each token."""

    name = ""

    def __init__(self, step_ms: int):
        self.step_ms = step_ms
        self.folder = tempfile.TemporaryDirectory(prefix=self.name)
        self.processes: dict[str, subprocess.Popen] = {}
        self.address = ""

    def __enter__(self):
        self.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.serves():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"{self.name} does not serve ({', '.join(dead) or 'no answer'})")
            time.sleep(0.3)
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()

    def run(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        log = open(f"{self.folder.name}/{name}.log", "w")
        self.processes[name] = subprocess.Popen(
            command, cwd=self.folder.name, env=os.environ | environment, stdout=log, stderr=log)

    def serves(self) -> bool:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        try:
            request = urllib.request.Request(
                f"http://{self.address}/v1/chat/completions", json.dumps(body).encode(),
                {"content-type": "application/json"})
            return urllib.request.urlopen(request, timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def cpu_seconds(self, name: str) -> float:
        fields = pathlib.Path(f"/proc/{self.processes[name].pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_bytes(self, name: str) -> int:
        return int(pathlib.Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1]) * PAGE

    def start(self):
        raise NotImplementedError


class Kvbm(Stack):
    name = "kvbm"

    def __init__(self, step_ms: int, binary: str, model: str, port: int):
        super().__init__(step_ms)
        self.binary, self.model, self.address = binary, model, f"{LOOPBACK}:{port}"

    def start(self):
        socket = f"unix:{self.folder.name}/worker.sock"
        quiet = {"DYN_LOG": "warn"}
        self.run("worker", [
            self.binary, "worker", "--model", self.model, "--engine", "echo", "--no-daemon", "--listen", socket,
            "--max-batch", "4096", "--max-waiting", "4096", "--max-batch-tokens", "8192",
            "--echo-step-ms", str(self.step_ms)], quiet)
        host, port = self.address.split(":")
        self.run("frontend", [
            self.binary, "frontend", "--worker", socket, "--http-host", host, "--http-port", port], quiet)


class Dynamo(Stack):
    name = "dynamo"

    def __init__(self, step_ms: int, venv: str, model: str, port: int):
        super().__init__(step_ms)
        self.python, self.model, self.address = f"{venv}/bin/python", model, f"{LOOPBACK}:{port}"

    def start(self):
        folder = self.folder.name
        environment = {
            "DYN_FILE_KV": f"{folder}/kv", "DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq", "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn", "ECHO_STEP_MS": str(self.step_ms),
            # Otherwise it takes the address of a network card.
            "DYN_TCP_RPC_HOST": LOOPBACK, "DYN_EVENT_PLANE_HOST": LOOPBACK, "DYN_SYSTEM_HOST": LOOPBACK,
            "DYN_TCP_RESPONSE_STREAM_HOST": LOOPBACK,
        }
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        self.run("worker", [self.python, str(HERE / "echo_worker.py"), self.model], environment)
        host, port = self.address.split(":")
        self.run("frontend", [
            self.python, "-m", "dynamo.frontend", "--http-host", host, "--http-port", port, *planes,
            "--router-mode", "round-robin", "--kv-cache-block-size", "32"], environment)
