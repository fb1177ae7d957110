"""`python -m kvbm_connector.serve_trtllm` over the fake engine: what requests become, and workers of one daemon and of two
behind the frontend, driven with the openai client. `serve_trtllm.py PATH_OF_KVBM`, with kvbm_connector importable."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import timedelta

import openai

HERE = os.path.dirname(os.path.abspath(__file__))
FAKES = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "fake_trtllm")]
MODEL = os.path.join(os.path.dirname(os.path.dirname(HERE)), "models", "tiny")
PROMPT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; "
    "and darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)
sys.path[:0] = FAKES

from kvbm_connector.logits_processing import BaseLogitsProcessor, TrtllmLogitsAdapter  # noqa: E402
from kvbm_connector.serve_trtllm.requests import Requests, salt_of  # noqa: E402
from kvbm_connector.serve_trtllm.service import Service  # noqa: E402


class Seen(BaseLogitsProcessor):
    calls: list[tuple[int, list[int]]] = []

    def __init__(self, token: int = 0) -> None:
        self.token = token

    def __call__(self, input_ids, logits) -> None:
        logits[self.token] = float("-inf")
        self.calls.append((self.token, list(input_ids)))


def request(**changes):
    plain = {
        "request_id": "r", "prompt": [5, 6, 7], "generated": [], "temperature": 0.0, "seed": None, "max_tokens": 4,
        "ignore_eos": False, "stop_token_ids": [], "cache_salt": None, "lora": None, "tenant": None, "dp_rank": None,
        "logits_processors": [], "multimodal": [], "retention": None, "top_p": None, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": None, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "untranslated": [],
    }
    return plain | changes


def refused(requests: Requests, **changes) -> str:
    try:
        requests.arguments(request(**changes))
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{changes} were taken")


def translation() -> None:
    from fake_engine.llm_api import LLM

    requests = Requests(LLM.generate_async, [("x", "/x"), ("y", "/y")], [("seen", f"{__name__}:Seen")])
    plain = requests.arguments(request())
    assert plain["inputs"] == {"prompt_token_ids": [5, 6, 7]} and plain["streaming"]
    assert plain["sampling_params"].top_k == 1 and plain["sampling_params"].temperature is None
    assert not {"cache_salt", "lora_request", "kv_cache_retention_config", "scheduling_params"} & plain.keys()
    moved = requests.arguments(request(generated=[8, 9], temperature=0.5, seed=3, stop_token_ids=[1], ignore_eos=True))
    sampling = moved["sampling_params"]
    assert moved["inputs"]["prompt_token_ids"] == [5, 6, 7, 8, 9]
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.stop_token_ids) == (2, 0.5, 3, [1])
    assert sampling.ignore_eos and sampling.include_stop_str_in_output
    chosen = requests.arguments(request(generated=[8], temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, min_tokens=3))
    sampling = chosen["sampling_params"]
    assert (sampling.top_p, sampling.top_k, sampling.min_p, sampling.min_tokens) == (0.9, 5, 0.1, 2)
    chosen = requests.arguments(request(repetition_penalty=1.5, presence_penalty=0.5))["sampling_params"]
    assert (chosen.repetition_penalty, chosen.presence_penalty, chosen.frequency_penalty) == (1.5, 0.5, None)
    assert "presence_penalty" in refused(requests, generated=[8], presence_penalty=0.5)
    assert "logit_bias" in refused(requests, untranslated=["logit_bias"])

    every = requests.arguments(request(
        cache_salt="s", lora="y", dp_rank=2, multimodal=[("image", "file:/a.png"), ("image", "b")],
        retention={"ranges": [(0, 32, 80, None), (32, None, None, 5000)], "decode_retention_priority": None,
                   "decode_duration_ms": 7},
    ))
    assert every["cache_salt"] == "s" and every["lora_request"].lora_int_id == 2
    assert every["scheduling_params"].attention_dp_rank == 2
    assert every["inputs"]["multi_modal_data"] == {"image": ["the image at file:/a.png", "the image at b"]}
    retention = every["kv_cache_retention_config"]
    first, second = retention.token_range_retention_configs
    assert (first.token_start, first.token_end, first.priority, first.duration_ms) == (0, 32, 80, None)
    assert (second.token_end, second.priority, second.duration_ms) == (None, 35, timedelta(seconds=5))
    assert (retention.decode_retention_priority, retention.decode_duration_ms) == (35, timedelta(milliseconds=7))

    assert "'z' is not known" in refused(requests, lora="z") and "x, y" in refused(requests, lora="z")
    assert "seen" in refused(requests, logits_processors=[("other", "")])
    assert "seen" in refused(requests, logits_processors=[("seen", '{"tocken": 1}')])
    assert "loads no 'smell'" in refused(requests, multimodal=[("smell", "u")])

    def old_api(inputs, sampling_params=None, streaming=False):
        raise NotImplementedError

    old = Requests(old_api, [], [])
    for field in ({"cache_salt": "s"}, {"tenant": "t"}, {"dp_rank": 0}):
        assert "this version of TensorRT-LLM" in refused(old, **field), field
    kept = old.arguments(request(retention={"ranges": [], "decode_retention_priority": 1, "decode_duration_ms": None}))
    assert "kv_cache_retention_config" not in kept, "advice is left out"

    pairs = [(None, None), ("t", None), ("t", "s"), (None, "s"), ("u", "s"), (None, 'tenant:["t", "s"]'), ("", "tenant:")]
    assert len({salt_of(*pair) for pair in pairs}) == len(pairs)


def logits() -> None:
    import numpy as np

    Seen.calls.clear()
    row = np.zeros((1, 1, 8))
    TrtllmLogitsAdapter(Seen(3))(1, row, [[5, 6]], None, None)
    assert row[0, 0, 3] == -np.inf and np.isfinite(row[0, 0, :3]).all() and Seen.calls == [(3, [5, 6])]
    for shape, ids in (((1, 2, 8), [[5], [6]]), ((2, 1, 8), [[5]])):
        try:
            TrtllmLogitsAdapter(Seen())(1, np.zeros(shape), ids, None)
        except ValueError as error:
            assert "sequence" in str(error)
        else:
            raise AssertionError(f"beams were taken: {shape}")


class Script:
    """A worker whose requests are written down, and whose answers are kept."""

    def __init__(self, events) -> None:
        self.events = list(events)
        self.said: list[tuple] = []
        self.running = 0

    def next(self, seconds):
        if self.events and (self.events[0][0] != "after" or self.events[0][1](self.said)):
            event = self.events.pop(0)
            return event if event[0] != "after" else self.next(seconds)
        time.sleep(0.005)
        return None

    def drain(self):
        self.said.append(("drain",))

    def __getattr__(self, name):
        def say(*values):
            self.said.append((name, *values))
            return True

        return say


class Result:
    """One token each time it is asked, without end unless it has one."""

    def __init__(self, count) -> None:
        self.count, self.aborted = count, False

    def abort(self) -> None:
        self.aborted = True

    async def __aiter__(self):
        from types import SimpleNamespace

        for so_far in range(1, self.count + 1):
            await asyncio.sleep(0.001)
            reason = "length" if so_far == self.count else None
            output = SimpleNamespace(token_ids=list(range(so_far)), finish_reason=reason)
            yield SimpleNamespace(outputs=[output], cached_tokens=2)


def service() -> None:
    made = []

    class Llm:
        def generate_async(self, inputs, sampling_params=None, streaming=False):
            if inputs["prompt_token_ids"] == [666]:
                raise RuntimeError("the engine is broken")
            made.append(Result(sampling_params.max_tokens))
            return made[-1]

    def has(*what):
        return lambda said: any(entry[: len(what)] == what for entry in said)

    worker = Script([
        (1, request(generated=[9])),
        ("after", has("finished", 1)),
        (2, request(max_tokens=1_000_000)),
        ("after", has("tokens", 2)),
        (2, None),
        (3, request(prompt=[666])),
        (4, request(cache_salt="s")),
        ("after", has("invalid", 4)),
    ])

    async def run():
        stop = asyncio.Event()
        serving = asyncio.create_task(Service(worker, Llm(), Requests(Llm().generate_async, [], [])).run(stop, 1.0))
        while worker.events or not has("failed", 3)(worker.said):
            await asyncio.sleep(0.005)
        stop.set()
        await asyncio.wait_for(serving, 10)

    asyncio.run(asyncio.wait_for(run(), 30))
    first = [entry for entry in worker.said if entry[1:2] == (1,)]
    assert first[0] == ("started", 1, 2, 0)
    assert [token for entry in first[1:-1] for token in entry[2]] == [0, 1, 2], first
    assert first[-1] == ("finished", 1, "length", 3, 4), first[-1]
    assert made[1].aborted and not has("finished", 2)(worker.said), "it was cancelled"
    assert any(entry[0] == "failed" and "broken" in entry[2] for entry in worker.said)
    assert any(entry[0] == "invalid" and "cache_salt" in entry[2] for entry in worker.said)
    assert worker.said.count(("drain",)) == 1


def wait(what: str, condition, seconds: float = 30.0):
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


class Fleet:
    """Daemons, as of so many nodes, a frontend for all, and workers over fake engines."""

    def __init__(self, kvbm: str, folder: str, nodes: int = 1, *options: str) -> None:
        self.folder = folder
        self.processes = []
        self.sockets = [f"{folder}/kvbm{node}.sock" for node in range(nodes)]
        for node, path in enumerate(self.sockets):
            self.start([kvbm, "daemon", "--socket", path, "--state-dir", f"{folder}/state{node}",
                        "--cpu-cache-gb", "0.1", "--metrics-port", "0"])
            wait("the daemon", lambda path=path: os.path.exists(path))
            options += ("--daemon", f"unix:{path}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.start([kvbm, "frontend", "--http-port", str(port), *options])
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def start(self, command, **environment):
        with open(f"{self.folder}/log{len(self.processes)}", "w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment)
        self.processes.append(process)
        return process

    def worker(self, name: str, node: int = 0):
        path = os.pathsep.join([*FAKES, *sys.path])
        process = self.start(
            [sys.executable, "-m", "kvbm_connector.serve_trtllm", "--model-path", MODEL, "--served-model-name", "fake",
             "--daemon", f"unix:{self.sockets[node]}", "--worker-id", name, "--socket", f"{self.folder}/{name}.sock"],
            PYTHONPATH=path, FAKE_TRTLLM_RECORD=f"{self.folder}/record-{name}", FAKE_ENGINE_VOCABULARY="4096",
        )
        line = process.stdout.readline()
        assert line and json.loads(line)["worker_id"] == name, self.logs()
        return process

    def logs(self) -> str:
        return "\n".join(open(f"{self.folder}/log{number}").read()[-2000:] for number in range(len(self.processes)))

    def asked(self, name: str) -> list:
        """What a worker's engine was asked."""
        try:
            return [json.loads(line) for line in open(f"{self.folder}/record-{name}")]
        except FileNotFoundError:
            return []

    def known_blocks(self) -> int:
        """Blocks that the router knows of."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=5) as answer:
            lines = [line.decode().split() for line in answer]
        return sum(int(float(line[1])) for line in lines if line[0].endswith("router_index_blocks"))

    def models(self) -> list[str]:
        try:
            with urllib.request.urlopen(f"{self.address}/v1/models", timeout=5) as answer:
                return [model["id"] for model in json.load(answer)["data"]]
        except OSError:
            return []

    def ask(self, prompt=PROMPT, **more):
        try:
            answer = self.client.completions.create(model="fake", prompt=prompt, max_tokens=20, temperature=0, **more)
        except openai.APIStatusError as error:
            # A worker that was killed is still listed for a moment.
            assert error.status_code == 503, error
            return None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def served(kvbm: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kvbm") as folder:
        fleet = Fleet(kvbm, folder)
        try:
            first = fleet.worker("a")
            wait("the model to be listed", lambda: "fake" in fleet.models())
            text, cached = fleet.ask()
            assert text and cached == 0, (text, cached)
            # What the second worker knows it has from the daemon.
            first.kill()
            first.wait()
            second = fleet.worker("b")
            wait("the prompt to be found by another engine", lambda: (fleet.ask() or ("", 0))[1] >= 32)
            assert fleet.ask()[0] == text
            salted = fleet.ask(extra_body={"cache_salt": "other", "kv_cache_retention_config": {
                "token_range_retention_configs": [{"token_start": 0, "token_end": 16, "priority": 80}]}})
            assert salted[1] == 0, "another salt finds nothing"
            last = fleet.asked("b")[-1]
            assert last[4] == "other" and "priority=80" in last[3], last
            chunks = list(fleet.client.completions.create(
                model="fake", prompt=PROMPT, max_tokens=20, temperature=0, stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
            # The engine's own checks fail its end.
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0, fleet.logs()
            wait("the worker to be gone", lambda: "fake" not in fleet.models())
        except BaseException:
            print(fleet.logs(), file=sys.stderr)
            raise
        finally:
            fleet.close()


def routed(kvbm: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kvbm") as folder:
        fleet = Fleet(kvbm, folder, 2, "--router-mode", "kv")
        try:
            names = ("a", "b")
            for node, name in enumerate(names):
                fleet.worker(name, node)
            wait("the model to be listed", lambda: "fake" in fleet.models())
            prompts = (f"{number}. {3 * PROMPT}" for number in range(10_000))
            # Where nobody has anything, both are asked.
            wait("both workers to be asked", lambda: fleet.ask(next(prompts)) and all(map(fleet.asked, names)))
            for _ in range(6):
                prompt, known = next(prompts), fleet.known_blocks()
                blocks = len(fleet.asked("a")[-1][0]) // 8
                before = [len(fleet.asked(name)) for name in names]
                text, _ = fleet.ask(prompt)
                # More than those of answers that were not known before.
                wait("the blocks to be known", lambda: fleet.known_blocks() >= known + blocks)
                assert fleet.ask(prompt)[0] == text
                fleet.ask(f"{prompt} And God said")
                asked = [len(fleet.asked(name)) - count for name, count in zip(names, before)]
                assert sorted(asked) == [0, 3], f"the node that has the blocks is asked again: {asked}"
        except BaseException:
            print(fleet.logs(), file=sys.stderr)
            raise
        finally:
            fleet.close()


def main() -> None:
    sys.modules["serve_trtllm"] = sys.modules[__name__]
    # What is refused and what fails here is meant to.
    logging.disable(logging.CRITICAL)
    translation()
    logits()
    service()
    served(os.path.abspath(sys.argv[1]))
    routed(os.path.abspath(sys.argv[1]))
    print("serve_trtllm: requests, logits processors, service, two workers behind a frontend, and two nodes in mode kv")


if __name__ == "__main__":
    main()
