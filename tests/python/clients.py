"""Real clients against `kvbm up`, unmodified. `clients.py PATH_OF_KVBM`."""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlparse

import openai

PROMPT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; "
    "and darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)


@contextmanager
def up(kvbm: str, **variables: str):
    with tempfile.TemporaryDirectory(prefix="kvbm") as state:
        command = [kvbm, "up", "--json", "--http-port", "0", "--metrics-port", "0", "--cpu-cache-gb", "0.1", "--state-dir", state]
        # A busy machine answers late, which would be a miss.
        environment = os.environ | {"KVBM_MATCH_DEADLINE_MS": "2000", "KVBM_DETACH_AFTER_MS": "5000"} | variables
        with open(f"{state}/log", "w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(open(f"{state}/log").read())
            yield json.loads(line) | {"log": f"{state}/log"}
        finally:
            process.terminate()
            assert process.wait(30) == 0


def completions(client: openai.OpenAI) -> None:
    def ask():
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)

    cold, warm = ask(), ask()
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.usage.prompt_tokens_details.cached_tokens >= 32
    assert cold.choices[0].text == warm.choices[0].text != ""
    assert cold.choices[0].finish_reason == "length" and cold.usage.completion_tokens == 24
    chunks = list(client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == cold.choices[0].text
    assert chunks[-1].usage.completion_tokens == 24 and not chunks[-1].choices


def chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "First Citizen:"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=16, temperature=0)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 16
    chunks = list(client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=16, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def seeds_and_stops(client: openai.OpenAI) -> None:
    def ask(seed: int, **more):
        return client.completions.create(model="tiny", prompt="LOVE, n.", max_tokens=32, temperature=0.9, seed=seed, **more).choices[0]

    assert ask(1).text == ask(1).text
    assert len({ask(seed).text for seed in range(4)}) > 1
    whole = ask(1).text
    stop = whole[8:11]
    cut = ask(1, stop=stop)
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def salts(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT + " Salted.", max_tokens=1, temperature=0, extra_body={"cache_salt": salt})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("a") == 0 and cached("a") > 0 and cached("b") == 0


def models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def refusals(client: openai.OpenAI) -> None:
    def refused(error: type, **arguments) -> openai.APIStatusError:
        try:
            client.completions.create(**({"model": "tiny", "prompt": "x", "max_tokens": 1} | arguments))
        except error as refusal:
            return refusal
        raise AssertionError(f"{arguments} was not refused")

    assert refused(openai.NotFoundError, model="huge").code == "model_not_found"
    assert refused(openai.BadRequestError, prompt="").param == "prompt"
    assert refused(openai.BadRequestError, max_tokens=-1).param == "max_tokens"
    assert refused(openai.BadRequestError, prompt=PROMPT * 200).code == "context_length_exceeded"


def bad_bytes(address: str) -> None:
    def post(body: bytes) -> tuple[int, dict]:
        connection = http.client.HTTPConnection(urlparse(address).netloc, timeout=60)
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        except (BrokenPipeError, ConnectionResetError):
            pass  # Refused while the body was still on its way: the answer is there to be read.
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    for body in (b"{", b"[1]", b'{"model":"tiny","prompt":"\xff"}', b""):
        status, answer = post(body)
        assert status == 400 and answer["error"]["message"], (body, status, answer)
    status, answer = post(b'{"model":"tiny","prompt":"' + b"x" * 100_000_000 + b'"}')
    assert status == 413 and answer["error"]["message"], status


def clients_that_leave(client: openai.OpenAI, metrics: str) -> None:
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2000, temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    # The next request is served at once, and nothing stays held.
    client.completions.create(model="tiny", prompt="Again", max_tokens=1)
    held = ("kvbm_leases", "kvbm_quarantined_blocks", "kvbm_transfers_in_flight")
    deadline = time.monotonic() + 20
    while any(sample(metrics, name) > 0 for name in held):
        assert time.monotonic() < deadline, {name: sample(metrics, name) for name in held}
        time.sleep(0.05)


def sample(url: str, name: str) -> float:
    with urllib.request.urlopen(url) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))


def main() -> None:
    with up(sys.argv[1]) as ready:
        client = openai.OpenAI(base_url=ready["http"] + "/v1", api_key="none", max_retries=0, timeout=60)
        tests = [completions, chat, seeds_and_stops, salts, models, refusals]
        for test in tests:
            test(client)
            print(f"client {test.__name__}: ok")
        bad_bytes(ready["http"])
        clients_that_leave(client, ready["metrics"])
        print(f"clients: {len(tests) + 2} passed, 0 failed")


if __name__ == "__main__":
    main()
