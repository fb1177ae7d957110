"""What a served vLLM does with our connector, each shown once: `features.py --kvbm target/ci/kvbm --model models/tiny`.

Every request is asked for again after the engine's own cache was emptied: it must say the same, and be found where it
may be found, and only there.

* salts and adapters keep their blocks to themselves
* a request waits for blocks that only the disk has
* the connector's figures are among the engine's metrics
* the engine's own KV events name blocks that were loaded, as they name those that it computed
* two ranks (tensor parallelism) keep a part of each block each
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from daemon import Node, wait_until
from served import Served, kvbm_config, prompts

BLOCK = 32
TOKENS = 4


def adapter(folder: Path, model: Path) -> Path:
    """Some adapter of attention, with random weights."""
    import torch
    from safetensors.torch import save_file

    shape = json.loads((model / "config.json").read_text())
    hidden, width = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    generator = torch.Generator().manual_seed(7)

    def some(*size: int) -> Any:
        return (torch.randn(*size, generator=generator) * 0.3).to(torch.bfloat16)

    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = some(8, hidden), some(width, 8)
    path = folder / "poet"
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


class Events:
    """What the engine publishes of blocks that it has."""

    def __init__(self, endpoint: str) -> None:
        import zmq

        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.subscribe(b"")

    def stored(self, blocks: int) -> list[int]:
        """Tokens of the next so many blocks that were stored."""
        import msgspec
        from vllm.distributed.kv_events import BlockStored, KVEventBatch

        decoder, tokens, seen = msgspec.msgpack.Decoder(type=KVEventBatch), list[int](), 0
        deadline = time.monotonic() + 60
        while seen < blocks and time.monotonic() < deadline:
            if self.socket.poll(1000):
                for event in decoder.decode(self.socket.recv_multipart()[-1]).events:
                    if isinstance(event, BlockStored):
                        tokens += event.token_ids
                        seen += len(event.block_hashes)
        return tokens

    def drop(self) -> None:
        while self.socket.poll(500):
            self.socket.recv_multipart()


class Shown:
    def __init__(self, node: Node, server: Served) -> None:
        self.node, self.server = node, server

    def ask(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        self.server.reset()
        return self.server.ask(prompt, TOKENS, **more)

    def stored(self, before: int, prompt: list[int]) -> None:
        blocks = (len(prompt) + TOKENS - 1) // BLOCK
        wait_until("the prompt is saved", lambda: self.node.host_blocks() >= before + blocks)

    def kept_apart(self, what: str, prompt: list[int], ways: list[dict[str, Any]]) -> list[str]:
        """Each way of asking finds what was asked in this way, and nothing else."""
        said = []
        for way in ways:
            before = self.node.host_blocks()
            answer = self.ask(prompt, **way)
            assert answer["cached"] == 0, f"{what}: {way} found {answer['cached']} tokens of others"
            self.stored(before, prompt)
            said.append(answer["text"])
        for way, text in zip(ways, said, strict=True):
            answer = self.ask(prompt, **way)
            assert answer["cached"] == (len(prompt) - 1) // BLOCK * BLOCK, f"{what}: {way} found {answer}"
            assert answer["text"] == text, f"{what}: {way} said {answer['text']!r}, before {text!r}"
        print(f"{what}: each of {len(ways)} finds its own blocks only", flush=True)
        return said

    def figures_grow(self, at_least: dict[str, int]) -> None:
        """The engine publishes what it was told with its next step."""

        def grown() -> bool:
            figures = self.server.figures()
            return all(figures.get(name, 0) >= count for name, count in at_least.items())

        def nudged() -> bool:
            self.server.ask([5, 6, 7], 1)
            return grown()

        wait_until(f"the engine's metrics have {at_least}, not {self.server.figures()}", nudged)
        print(f"the engine's metrics: {self.server.figures()}", flush=True)


def one_rank(folder: Path, options: argparse.Namespace) -> None:
    poet = adapter(folder, options.model)
    disk = folder / "disk"
    disk.mkdir()
    small = ["--cpu-cache-gb", "0.05", "--disk-cache-gb", "1", "--disk-cache-dir", str(disk)]
    node = Node(options.kvbm, folder, *small, "--disable-disk-offload-filter", held=False)
    node.start()
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"poet={poet}"]
    # On a busy machine a lookup may take long; here it is asked what is found, not how fast.
    config = kvbm_config(node.socket, lookup_deadline_ms=1000, detach_after_ms=20000)
    endpoint = f"ipc://{folder}/events"
    published = json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint})
    server = Served(folder, options.model, config, *lora, "--kv-events-config", published)
    try:
        shown = Shown(node, server)
        first = prompts(11, 1, 500)[0]
        wait_until("a prompt is found", lambda: bool(shown.ask(first)["cached"]))
        salted, adapted = prompts(12, 2, 300)
        shown.kept_apart("salts", salted, [{}, {"cache_salt": "a"}, {"cache_salt": "b"}])
        plain, other = shown.kept_apart("adapters", adapted, [{}, {"model": "poet"}])
        assert plain != other, "the adapter changes nothing, so this shows nothing"
        events = Events(endpoint)
        time.sleep(1)  # a subscription takes a moment, and nothing says when it is there
        events.drop()
        whole = len(salted) // BLOCK
        assert shown.ask(salted)["cached"] == (len(salted) - 1) // BLOCK * BLOCK
        told = events.stored(whole)
        assert told[: whole * BLOCK] == salted[: whole * BLOCK], f"events tell of {len(told)} tokens: {told[:40]}"
        print("the engine's events tell of blocks that were loaded", flush=True)
        waits(shown, first)
        shown.figures_grow({"queries": 10, "saved_blocks": 30, "loaded_blocks": 30, "attaches": 2, "disk_waits": 1})
    except AssertionError:
        print((folder / "daemon.log").read_text()[-1500:], server.log.read_text()[-2500:])
        raise
    finally:
        server.kill()
        node.close()


def waits(shown: Shown, first: list[int]) -> None:
    """Other prompts drive the first ones out of host memory; on disk they are found."""
    asked = prompts(13, 60, 800)
    said = [shown.ask(prompt)["text"] for prompt in asked]
    wait_until("host memory is written to disk", lambda: shown.node.blocks("disk") >= 40 * (800 // BLOCK))
    found = [shown.ask(prompt) for prompt in asked[:20]]
    assert [answer["text"] for answer in found] == said[:20], "blocks from disk change what is said"
    from_disk = sum(answer["cached"] > 0 for answer in found)
    assert from_disk >= 15, f"{from_disk} of 20 prompts were found on disk"
    print(f"disk: {from_disk} of 20 prompts that had left host memory were found, {shown.server.figures()}", flush=True)


def two_ranks(folder: Path, options: argparse.Namespace) -> None:
    node = Node(options.kvbm, folder, "--cpu-cache-gb", "0.2", held=False)
    node.start()
    config = kvbm_config(node.socket, lookup_deadline_ms=1000, detach_after_ms=20000)
    server = Served(folder, options.model, config, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        shown = Shown(node, server)
        wait_until("a prompt is found", lambda: bool(shown.ask(prompts(21, 1, 100)[0])["cached"]))
        rng = random.Random(3)
        for prompt in prompts(22, 8, 900):
            shown.kept_apart("two ranks", prompt[: rng.randrange(40, 900)], [{}])
    except AssertionError:
        print((folder / "daemon.log").read_text()[-1500:], server.log.read_text()[-2500:])
        raise
    finally:
        server.kill()
        node.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvbm", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", choices=["one_rank", "two_ranks"], help="a part of it")
    options = parser.parse_args()
    for part in (one_rank, two_ranks):
        if options.only in (None, part.__name__):
            with tempfile.TemporaryDirectory() as name:
                part(Path(name), options)
    print(f"{time.strftime('%H:%M:%S')} features of vLLM: passed")


if __name__ == "__main__":
    sys.exit(main())
