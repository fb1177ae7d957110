"""Every parameter of the API with the openai client: values, shapes, errors. `conformance.py PATH_OF_KVBM`.

`KVBM_SCHEMAS=500` in the environment: answers of so many random schemas are checked instead of 40."""

import json
import os
import random
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai

from clients import PROMPT, up

SCHEMAS = int(os.environ.get("KVBM_SCHEMAS", "40"))


def complete(client: openai.OpenAI, **more):
    extra = {name: more.pop(name) for name in list(more) if name in EXTRA}
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24} | more
    return client.completions.create(**arguments, extra_body=extra)


EXTRA = (
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "nvext", "cache_salt",
    "kv_cache_retention_config", "max_completion_tokens", "response_format",
)


def text(client: openai.OpenAI, **more) -> str:
    return complete(client, **more).choices[0].text


def sampling(client: openai.OpenAI) -> None:
    greedy = text(client, temperature=0)
    assert text(client, temperature=1, top_k=1, seed=5) == greedy
    assert text(client, temperature=1, top_p=1e-6, seed=5) == greedy
    assert text(client, temperature=1, min_p=1.0, seed=5) == greedy
    assert text(client, temperature=1, seed=5, nvext={"top_k": 1}) == greedy
    hot = {text(client, temperature=1.5, seed=seed) for seed in range(4)}
    assert len(hot) == 4 and hot == {text(client, temperature=1.5, seed=seed) for seed in range(4)}
    # A prompt of repetitions goes on repeating, unless that costs.
    again = "the same the same the same the same the same the same"
    plain = text(client, prompt=again, temperature=0)
    for penalty in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert text(client, prompt=again, temperature=0, max_tokens=64, **penalty) != text(
            client, prompt=again, temperature=0, max_tokens=64), penalty
    assert plain == text(client, prompt=again, temperature=0, repetition_penalty=1.0, frequency_penalty=0)


def biases(client: openai.OpenAI) -> None:
    answer = complete(client, temperature=0, logprobs=0, max_tokens=4, logit_bias={"920": 100}).choices[0]
    assert len(set(answer.logprobs.tokens)) == 1 and answer.text == answer.logprobs.tokens[0] * 4


def stops(client: openai.OpenAI) -> None:
    whole = text(client, temperature=0)
    stop = whole[10:13]
    answer = complete(client, temperature=0, stop=[stop, "never"]).choices[0]
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    late = complete(client, temperature=0, stop=stop, min_tokens=24).choices[0]
    assert len(late.text) > len(answer.text)
    for ids in ([920], list(range(920, 1040))):
        never = complete(client, temperature=0, stop_token_ids=ids, logit_bias={"920": 100}, max_tokens=5).choices[0]
        assert never.text == "" and never.finish_reason == "stop"
        later = complete(
            client, temperature=0, stop_token_ids=ids, logit_bias={"920": 100}, max_tokens=5, min_tokens=3, logprobs=0)
        assert later.usage.completion_tokens == 4 and later.choices[0].finish_reason == "stop"
    full = complete(client, temperature=0, max_tokens=40, ignore_eos=True)
    assert full.usage.completion_tokens == 40 and full.choices[0].finish_reason == "length"
    least = complete(client, prompt="x", temperature=0, max_tokens=40, min_tokens=40)
    assert least.usage.completion_tokens == 40


def logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, temperature=0, logprobs=3, max_tokens=8)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 8
    assert "".join(found.tokens) == answer.choices[0].text
    offset = 0
    for token, logprob, top, at in zip(found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset):
        assert logprob <= 0 and len(top) <= 3 and max(top.values()) == logprob == top[token] and at == offset
        offset += len(token)
    # The distribution is the model's own: temperature has no part in it.
    assert complete(client, temperature=0.01, seed=1, logprobs=3, max_tokens=8).choices[0].logprobs == found
    streamed = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert sum((piece.token_logprobs for piece in pieces), []) == found.token_logprobs

    messages = [{"role": "user", "content": "First Citizen:"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob


def echo(client: openai.OpenAI) -> None:
    plain = text(client, temperature=0, max_tokens=8)
    answer = complete(client, temperature=0, max_tokens=8, echo=True, logprobs=1)
    assert answer.choices[0].text == PROMPT + plain
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] is None and all(logprob <= 0 for logprob in found.token_logprobs[1:])
    assert len(found.tokens) == answer.usage.prompt_tokens + 8
    scored = complete(client, temperature=0, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == PROMPT and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[:-8]
    # What was listed as output is listed as prompt with the same numbers.
    again = complete(client, prompt=PROMPT + plain, temperature=0, max_tokens=0, echo=True, logprobs=1)
    if again.usage.prompt_tokens == len(found.tokens):
        differences = [abs(a - b) for a, b in zip(again.choices[0].logprobs.token_logprobs[1:], found.token_logprobs[1:])]
        assert max(differences) == 0, max(differences)


def choices(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=["LOVE, n.", "First Citizen:"], n=3, temperature=1.2, seed=11, max_tokens=12)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens <= 72
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 6
    single = [text(client, prompt="LOVE, n.", temperature=1.2, seed=11 + i, max_tokens=12) for i in range(3)]
    assert texts[:3] == single
    chunks = client.completions.create(
        model="tiny", prompt="LOVE, n.", n=3, temperature=1.2, seed=11, max_tokens=12, stream=True)
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == single
    one = complete(client, prompt="LOVE, n.", max_tokens=4)
    three = complete(client, prompt="LOVE, n.", n=3, max_tokens=4)
    assert one.usage.prompt_tokens == three.usage.prompt_tokens


def guided(client: openai.OpenAI) -> None:
    assert text(client, guided_choice=["yes", "no"], temperature=1, seed=1) in ("yes", "no")
    date = text(client, guided_regex=r"[0-9]{4}-[0-9]{2}", temperature=1, seed=1)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", date)
    total = text(client, guided_grammar='start: NUMBER ("+" NUMBER)~2\nNUMBER: /[0-9]{1,3}/', temperature=1, seed=2)
    assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){2}", total)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"], "additionalProperties": False,
    }
    for spelling in (
        {"guided_json": schema}, {"nvext": {"guided_json": schema}}, {"structured_outputs": {"json": schema}},
        {"guided_json": json.dumps(schema)},
    ):
        jsonschema.validate(json.loads(text(client, temperature=1, seed=3, max_tokens=200, **spelling)), schema)
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Who?"}], temperature=1, seed=4, max_completion_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}})
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    cut = complete(client, guided_regex="[a-z]{400}", temperature=0, max_tokens=4).choices[0]
    assert cut.finish_reason == "length" and re.fullmatch("[a-z]+", cut.text)


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = ["boolean", "integer", "string", "enum"] + (["array", "object"] if depth else [])
    match rng.choice(kinds):
        case "boolean":
            return {"type": "boolean"}
        case "integer":
            least = rng.randint(-50, 50)
            return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 12)}
        case "enum":
            return {"enum": ["red", "green", 5, None]}
        case "array":
            return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": 1, "maxItems": rng.randint(1, 3)}
    names = [f"k{index}" for index in range(rng.randint(1, 3))]
    return {
        "type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": names[: rng.randint(0, len(names))], "additionalProperties": False,
    }


def random_schemas(client: openai.OpenAI) -> None:
    def check(seed: int) -> None:
        schema = random_schema(random.Random(seed))
        answer = complete(client, prompt="JSON:", guided_json=schema, temperature=1, seed=seed, max_tokens=1000).choices[0]
        assert answer.finish_reason == "stop", (seed, schema, answer)
        jsonschema.validate(json.loads(answer.text), schema)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, range(SCHEMAS)))


def limits(client: openai.OpenAI) -> None:
    ids = [list(range(300, 310)), list(range(400, 420))]
    both = complete(client, prompt=ids, max_tokens=3, temperature=0, ignore_eos=True)
    assert [choice.index for choice in both.choices] == [0, 1] and both.usage.prompt_tokens == 30
    assert both.usage.completion_tokens == 6
    assert both.choices[1].text == text(client, prompt=ids[1], max_tokens=3, temperature=0, ignore_eos=True)
    short = complete(client, max_tokens=9, max_completion_tokens=4, temperature=0, ignore_eos=True)
    assert short.usage.completion_tokens == 4
    chunks = list(client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens <= 4 and all(chunk.usage is None for chunk in chunks[:-1])
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "First Citizen:"}], "max_completion_tokens": 2}
    for more in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"x": [1]}}):
        assert client.chat.completions.create(**chat, extra_body=more).usage.completion_tokens <= 2
    parts = [{"type": "text", "text": "First "}, {"type": "text", "text": "Citizen:"}]
    assert client.chat.completions.create(**(chat | {"messages": [{"role": "user", "content": parts}]})).choices


def cache(client: openai.OpenAI) -> None:
    def cached(**more) -> int:
        return complete(client, max_tokens=1, **more).usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="a") == 0 == cached(cache_salt="b") == cached(nvext={"cache_salt": "c", "tenant": "t"})
    # A daemon that is slow to answer is a miss, now and then.
    assert any(cached(cache_salt="a") >= 32 for _ in range(5))
    keep = {"token_range_retention_configs": [{"token_start": 0, "token_end": 32, "priority": 90, "duration_ms": 60000}]}
    for spelling in ({"kv_cache_retention_config": keep}, {"nvext": {"kv_cache_retention_config": keep}}):
        assert complete(client, max_tokens=1, **spelling).usage.completion_tokens == 1


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a city",
        "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def tools(client: openai.OpenAI) -> None:
    arguments = {
        "model": "tiny", "messages": [{"role": "user", "content": "How is the weather?"}], "tools": [WEATHER],
        "temperature": 1, "seed": 5, "max_completion_tokens": 200,
    }
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(**arguments, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert answer.finish_reason == "tool_calls" and len(answer.message.tool_calls) == 1 and not answer.message.content
        call = answer.message.tool_calls[0]
        assert call.type == "function" and call.id and call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
        pieces, name = "", ""
        for chunk in client.chat.completions.create(**arguments, tool_choice=choice, parallel_tool_calls=False, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                pieces += part.function.arguments or ""
                name += part.function.name or ""
        assert name == "weather" and json.loads(pieces) == json.loads(call.function.arguments)
    none = client.chat.completions.create(**(arguments | {"max_completion_tokens": 5}), tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.finish_reason in ("length", "stop")


def errors(client: openai.OpenAI) -> None:
    wrong = [
        ({"top_p": 2}, "top_p"), ({"temperature": 3}, "temperature"), ({"n": 0}, "n"), ({"logprobs": 50}, "logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"top_k": -5}, "top_k"), ({"min_p": 2}, "min_p"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"min_tokens": 100}, "min_tokens"), ({"stop": [""]}, "stop"), ({"max_tokens": -1}, "max_tokens"),
        ({"guided_regex": "("}, "guided_regex"), ({"guided_json": {"type": "strange"}}, "guided_json"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"), ({"suffix": "x"}, "suffix"), ({"best_of": 5}, "best_of"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"), ({"echo": "yes"}, "echo"),
        ({"cache_salt": 5}, "cache_salt"), ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"seed": 1.5}, "seed"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"), ({"ignore_eos": 3}, "ignore_eos"),
        ({"kv_cache_retention_config": 5}, "kv_cache_retention_config"), ({"structured_outputs": {"xml": 1}}, "structured_outputs"),
        ({"guided_choice": [""]}, "guided_choice"), ({"response_format": {"type": "xml"}}, "response_format"),
        ({"prompt": []}, "prompt"), ({"prompt": [99999]}, "prompt"), ({"prompt": "x" * 60000}, "prompt"),
    ]
    for fields, parameter in wrong:
        try:
            complete(client, **fields)
        except openai.BadRequestError as refusal:
            assert refusal.param == parameter and parameter in refusal.message, (fields, refusal)
        else:
            raise AssertionError(f"{fields} was not refused")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
    for fields, parameter in [
        ({"messages": image}, "messages"), ({"tools": [WEATHER]}, "tools"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"), ({"messages": []}, "messages"),
        ({"parallel_tool_calls": 1, "tools": [WEATHER], "tool_choice": "required"}, "parallel_tool_calls"),
        ({"extra_body": {"chat_template_kwargs": 5}}, "chat_template_kwargs"),
        ({"extra_body": {"add_generation_prompt": 5}}, "add_generation_prompt"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}}, "response_format"),
    ]:
        arguments = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]} | fields
        try:
            client.chat.completions.create(**arguments)
        except openai.BadRequestError as refusal:
            assert refusal.param == parameter, (fields, refusal)
        else:
            raise AssertionError(f"{fields} was not refused")
    for call in (lambda: complete(client, model="nobody"), lambda: client.models.retrieve("nobody")):
        try:
            call()
        except openai.NotFoundError as refusal:
            assert refusal.status_code == 404
        else:
            raise AssertionError("a model that is not there was found")


def server(address: str, client: openai.OpenAI) -> None:
    def get(path: str) -> str:
        with urllib.request.urlopen(address + path) as response:
            return response.read().decode()

    described = json.loads(get("/openapi.json"))
    assert described["openapi"].startswith("3.") and "/v1/chat/completions" in described["paths"]
    answer = client.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=1, extra_headers={"x-request-id": "conformance-1"})
    assert answer.headers["x-request-id"] == "conformance-1" and answer.parse().id == "cmpl-conformance-1"
    sent = {"CompletionRequest": SENT["/v1/completions"], "ChatCompletionRequest": SENT["/v1/chat/completions"]}
    for schema, names in sent.items():
        # What chats have in common with completions is sent to one of them at least.
        known = set(described["components"]["schemas"][schema]["properties"])
        unsent = known - names - (sent["CompletionRequest"] if schema == "ChatCompletionRequest" else set())
        assert not unsent, f"no test sends {unsent}"
    metrics = get("/metrics")
    for name in ("requests_total", "requests_started_total", "model_ready", "queued_requests", "active_requests",
                 "tokenizer_latency_ms_bucket", "kv_hit_rate_bucket", "kv_worker_reused_tokens_total",
                 "model_context_length", "time_to_first_token_seconds_bucket", "failures_total"):
        assert f"dynamo_frontend_{name}" in metrics, name
    for gauge in ("queued_requests", "active_requests", "inflight_requests"):
        assert f'dynamo_frontend_{gauge}{{model="tiny"}} 0' in metrics, gauge


SEEDED = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.3, "seed": 8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
    {"temperature": 0.7, "seed": 9, "min_p": 0.05, "logprobs": 2, "n": 2},
    {"temperature": 1.0, "seed": 10, "guided_regex": "[A-Z][a-z]{5,30}"},
]


def seeded(client: openai.OpenAI) -> list[str]:
    """Answers that nothing but the request decides, computed with the cache empty and not."""
    answers, hits = [], []
    for fields in SEEDED:
        first, second = (complete(client, **fields) for _ in range(2))
        assert [c.model_dump() for c in first.choices] == [c.model_dump() for c in second.choices], fields
        longer = complete(client, prompt=PROMPT + " And God", **fields)
        hits += [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, longer)]
        answers += [json.dumps(choice.model_dump()) for choice in first.choices + longer.choices]
    # A daemon that is slow to answer is a miss, now and then.
    assert hits[0] == 0 and max(hits) >= 32, hits
    return answers


# Names of the parameters that were sent, by path.
SENT: dict[str, set[str]] = {"/v1/completions": set(), "/v1/chat/completions": set()}


def note(request) -> None:
    if request.method == "POST":
        SENT[request.url.path].update(json.loads(request.content))


def connect(ready: dict) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(timeout=120, event_hooks={"request": [note]})
    return openai.OpenAI(base_url=ready["http"] + "/v1", api_key="none", max_retries=0, timeout=120, http_client=http)


def log(ready: dict, client: openai.OpenAI) -> None:
    """Lines of the log are JSON objects, one for each request, and a filter leaves others out."""
    for fields in ({}, {"top_p": 7}):
        try:
            complete(client, max_tokens=2, extra_headers={"x-request-id": f"logged-{len(fields)}"}, **fields)
        except openai.BadRequestError:
            assert fields
    # A line may be written a moment after its answer, and other lines are not about requests.
    until, of_request = time.monotonic() + 10, {}
    while time.monotonic() < until and not {"logged-0", "logged-1"} <= of_request.keys():
        with open(ready["log"]) as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        of_request = {line.get("request_id"): line for line in lines}
        time.sleep(0.05)
    assert {line["target"] for line in lines if line["level"] == "INFO"} == {"access"}
    good, bad = of_request["logged-0"], of_request["logged-1"]
    assert (good["status"], good["model"], good["completion_tokens"]) == ("success", "tiny", 2)
    assert good["first_token_ms"] <= good["duration_ms"] and good["prompt_tokens"] > 32
    assert (bad["status"], bad["error_type"]) == ("error", "validation")


def main() -> None:
    with up(sys.argv[1]) as ready:
        client = connect(ready)
        # First, while the cache is empty.
        before = seeded(client)
        tests = [sampling, biases, stops, logprobs, echo, choices, guided, random_schemas, limits, cache, tools, errors]
        for test in tests:
            test(client)
            print(f"conformance {test.__name__}: ok", flush=True)
        server(ready["http"], client)
    with up(sys.argv[1], DYN_LOGGING_JSONL="1", DYN_LOG="warn,access=info") as ready:
        client = connect(ready)
        assert seeded(client) == before
        log(ready, client)
    print(f"conformance: {len(tests) + 3} passed, 0 failed")


if __name__ == "__main__":
    main()
