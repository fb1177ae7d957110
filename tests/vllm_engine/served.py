"""`vllm serve` with some connector, and a client that asks it."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from daemon import wait_until


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def prompts(seed: int, count: int, tokens: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 4000) for _ in range(tokens)] for _ in range(count)]


ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For servers whose times are compared: with a thread on each core, all wait whenever something else needs a core."""


class Served:
    """An OpenAI server of vLLM on the CPU."""

    def __init__(
        self, folder: Path, model: Path, config: dict[str, Any] | None, *arguments: str, **environment: str
    ) -> None:
        self.port = free_port()
        self.log = folder / f"served-{self.port}.log"
        transfer = [] if config is None else ["--kv-transfer-config", json.dumps({**config, "kv_role": "kv_both"})]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            "tiny",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--enforce-eager",
            "--max-model-len",
            "2048",
            "--dtype",
            "bfloat16",
            "--block-size",
            "32",
            "--enable-prompt-tokens-details",
            "--disable-hybrid-kv-cache-manager",
            *transfer,
            *arguments,
        ]
        variables = {
            **os.environ,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **environment,
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
        try:
            wait_until("the server answers", self._answers, 400)
        except AssertionError:
            self.kill()
            raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}") from None

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError("it ended")
        try:
            return self._post("GET", "/health", None)[0] == 200
        except OSError:
            return False

    def _post(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def ask(self, prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
        """One request: what it said, how long it took, ms, and how many tokens were cached. `more`: other fields."""
        begun = time.monotonic()
        status, answer = self._post(
            "POST",
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": count,
                "temperature": 0,
                "ignore_eos": True,
                **more,
            },
        )
        took = (time.monotonic() - begun) * 1e3
        if status != 200:
            raise AssertionError(f"a request failed: {status} {answer[:500]!r}")
        said = json.loads(answer)
        details = said["usage"].get("prompt_tokens_details") or {}
        return {"text": said["choices"][0]["text"], "ms": took, "cached": details.get("cached_tokens") or 0}

    def figures(self) -> dict[str, float]:
        """What the engine's own metrics say of the connector: `vllm:kvbm_...` without that, summed over engines."""
        status, text = self._post("GET", "/metrics", None)
        assert status == 200, text[:500]
        figures: dict[str, float] = {}
        for line in text.decode().splitlines():
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            if name.startswith("vllm:kvbm_") and name.endswith("_total"):
                name = name.removeprefix("vllm:kvbm_").removesuffix("_total")
                figures[name] = figures.get(name, 0) + float(value)
        return figures

    def reset(self) -> None:
        """Empties the engine's own prefix cache."""
        assert self._post("POST", "/reset_prefix_cache", None)[0] == 200

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def kvbm_config(socket_path: Path, **options: Any) -> dict[str, Any]:
    extra = {"kvbm.endpoint": f"unix:{socket_path}", **{f"kvbm.{name}": value for name, value in options.items()}}
    return {
        "kv_connector": "KvbmConnector",
        "kv_connector_module_path": "kvbm_connector.vllm",
        "kv_connector_extra_config": extra,
    }
