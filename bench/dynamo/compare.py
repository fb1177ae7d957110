"""What serving costs beside Dynamo: both with a worker that computes nothing, under the same load, in turn.

    compare.py --kvbm target/ci/kvbm --dynamo VENV [--rounds 3] [--seconds 6] [--clients 16] [--streams 128]
               [--step-ms 10] [--json FILE]

README.md beside this file says what is needed. Both stacks stay up all the time; each round loads one, then the other, so
that whatever else the machine does meets both.
"""

import argparse
import asyncio
import json
import pathlib
import re
import statistics
import subprocess
import tempfile
import time

from stacks import Dynamo, Kvbm, Stack

# A request of one token; and streams of workers that take their time for each token, so that what is measured is not how
# fast a worker can say nothing.
UNARY_STEP_MS = 0
STREAM_TOKENS = 16
PACED_STEP_MS = 10
STREAMS = 1000
STREAM_STEP_MS = 500
PROMPT = "hello world " * 16

REPORT = """
done = function(summary, latency, requests)
  io.write(string.format("REPORT %d %d %f %f %f\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), summary.errors.status + summary.errors.timeout + summary.errors.read))
end
"""


def body(tokens: int, stream: bool) -> str:
    message = {"role": "user", "content": PROMPT}
    return json.dumps({
        "model": "tiny", "messages": [message], "max_tokens": tokens, "ignore_eos": True, "stream": stream})


def load(stack: Stack, tokens: int, stream: bool, clients: int, seconds: int) -> dict[str, float]:
    """One run of wrk, and the CPU that frontend and worker took meanwhile."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        text = body(tokens, stream).replace("\\", "\\\\").replace("'", "\\'")
        script.write(f"wrk.method = 'POST'\nwrk.headers['content-type'] = 'application/json'\nwrk.body = '{text}'\n")
        script.write(REPORT)
        script.flush()
        names = ("frontend", "worker")
        before = {name: stack.cpu_seconds(name) for name in names}
        said = subprocess.run(
            ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "-s", script.name,
             f"http://{stack.address}/v1/chat/completions"],
            capture_output=True, text=True, check=True).stdout
        used = {name: stack.cpu_seconds(name) - before[name] for name in names}
    requests, micros, p50, p99, errors = map(float, re.search(r"REPORT (.*)", said).group(1).split())
    if errors:
        raise RuntimeError(f"{stack.name}: {errors:.0f} requests failed\n{said}")
    return {
        "requests/s": requests / micros * 1e6, "p50 ms": p50 / 1000, "p99 ms": p99 / 1000,
        "frontend CPU us/request": used["frontend"] / requests * 1e6,
        "CPU us/request": sum(used.values()) / requests * 1e6,
    }


async def open_streams(stack: Stack) -> float:
    """Bytes of the frontend's memory for each of 1,000 streams that are open."""
    host, port = stack.address.split(":")
    text = body(100_000, True).replace("100000", "2000")
    request = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: {stack.address}\r\ncontent-type: application/json\r\n"
               f"content-length: {len(text)}\r\n\r\n{text}").encode()
    counted = 0

    async def follow():
        nonlocal counted
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        seen = False
        while line := await reader.readline():
            if not seen and line.startswith(b"data: "):
                seen, counted = True, counted + 1

    before = stack.resident_bytes("frontend")
    tasks = [asyncio.create_task(follow()) for _ in range(STREAMS)]
    deadline = time.monotonic() + 60
    while counted < STREAMS:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{stack.name}: {counted} of {STREAMS} streams began")
        await asyncio.sleep(0.2)
    await asyncio.sleep(5)
    grown = stack.resident_bytes("frontend") - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return grown


def main() -> None:
    here = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", default=str(here / "target/ci/kvbm"), help="the binary")
    parser.add_argument("--dynamo", required=True, help="virtual environment with ai-dynamo")
    parser.add_argument("--model", default=str(here / "models/tiny"), help="folder with a tokenizer and a chat template")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=16, help="connections, unary")
    parser.add_argument("--streams", type=int, default=128, help="connections, streaming")
    parser.add_argument("--step-ms", type=int, default=PACED_STEP_MS, help="of the workers, streaming")
    parser.add_argument("--no-memory", action="store_true", help="without the 1,000 open streams")
    parser.add_argument("--json", help="write all figures into this file")
    args = parser.parse_args()
    binary, model = (str(pathlib.Path(path).resolve()) for path in (args.kvbm, args.model))
    venv = str(pathlib.Path(args.dynamo).absolute())

    def stacks(step_ms: int, port: int) -> tuple[Stack, Stack]:
        return Kvbm(step_ms, binary, model, port), Dynamo(step_ms, venv, model, port + 1)

    figures: dict[str, dict[str, list[float]]] = {}
    paced = f"stream {args.step_ms} ms"
    cases = {"unary": (UNARY_STEP_MS, 1, False, args.clients), paced: (args.step_ms, STREAM_TOKENS, True, args.streams)}
    for at, (case, (step_ms, tokens, stream, clients)) in enumerate(cases.items()):
        with (pair := stacks(step_ms, 18100 + 4 * at))[0], pair[1]:
            for number in range(args.rounds + 1):
                for stack in pair:
                    # The first round warms up.
                    seconds = args.seconds if number else 2
                    found = load(stack, tokens, stream, clients, seconds)
                    for name, value in found.items() if number else ():
                        figures.setdefault(f"{case} {name}", {}).setdefault(stack.name, []).append(value)
    if not args.no_memory:
        for number, stack in enumerate(stacks(STREAM_STEP_MS, 18110)):
            with stack:
                grown = asyncio.run(open_streams(stack))
            figures.setdefault("MB for 1,000 open streams", {})[stack.name] = [grown / 1e6]

    worse = []
    print(f"{'':32} {'kvbm':>12} {'dynamo':>12}  kvbm/dynamo")
    for name, found in figures.items():
        ours, theirs = (statistics.median(found[stack]) for stack in ("kvbm", "dynamo"))
        is_better = ours > theirs if "requests/s" in name else ours < theirs
        print(f"{name:32} {ours:12.3f} {theirs:12.3f}  {ours / theirs:8.3f}{'' if is_better else '  WORSE'}")
        worse += [] if is_better else [name]
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=1))
    if worse:
        raise SystemExit(f"worse than Dynamo: {', '.join(worse)}")


if __name__ == "__main__":
    main()
