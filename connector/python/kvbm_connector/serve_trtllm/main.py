"""The process: engine first, then the worker that frontends find."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
from typing import Any

from .._native import Worker, socket_of
from .._trtllm_checks import setting_at
from .arguments import engine_arguments, parse
from .requests import Requests
from .service import Service


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        daemon = socket_of(parsed.daemon)
        # Ranks in other processes see only variables of these names.
        os.environ["TLLM_KVBM_ENDPOINT"] = f"unix:{daemon}"
        chosen = engine_arguments(parsed.extra_engine_args)
    except (OSError, ValueError) as error:
        return _refused(error)
    try:
        from tensorrt_llm import LLM
    except ImportError as error:
        return _refused(f"TensorRT-LLM cannot be imported here: {error}")
    base_file = _base_file()
    try:
        # Before this process has threads of ours: some engines fork.
        llm = LLM(model=parsed.model_path, **chosen)
        base_namespace = _base_namespace(base_file)
    finally:
        del os.environ["TLLM_KVBM_BASE_FILE"]
        os.unlink(base_file)
    try:
        try:
            requests = Requests(llm.generate_async, parsed.lora, parsed.logits_processor)
        except (ImportError, ValueError) as error:
            return _refused(error)
        worker = Worker(
            worker_id=parsed.worker_id,
            model=parsed.served_model_name,
            socket=parsed.socket,
            daemon=daemon,
            role=parsed.role,
            requests_max=parsed.requests_max,
            base_namespace=base_namespace,
            **_described(parsed.model_path, llm),
        )
        print(json.dumps({"worker_id": parsed.worker_id, "socket": parsed.socket}), flush=True)
        try:
            asyncio.run(_serve(worker, llm, requests, parsed.drain_seconds))
        finally:
            worker.close()
    finally:
        llm.shutdown()
    return 0


async def _serve(worker: Worker, llm: Any, requests: Requests, drain_seconds: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Service(worker, llm, requests).run(stop, drain_seconds)


def _base_file() -> str:
    """Where the connector of rank 0, whichever process that is, writes what the keys of its blocks begin with."""
    made, path = tempfile.mkstemp(prefix="kvbm-base-")
    os.close(made)
    os.environ["TLLM_KVBM_BASE_FILE"] = path
    return path


def _base_namespace(path: str) -> bytes | None:
    """None with another connector, or where rank 0 has another file system: frontends then go by load."""
    with open(path, "rb") as file:
        base = file.read()
    return base if len(base) == 32 else None


def _described(model_path: str, llm: Any) -> dict[str, Any]:
    """What frontends are told of the model."""
    config = _json(os.path.join(model_path, "config.json"))
    config = config.get("text_config", config)
    generation = _json(os.path.join(model_path, "generation_config.json"))
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    length = setting_at(llm.args, "max_seq_len") or config.get("max_position_embeddings") or 4096
    folder = model_path if os.path.isdir(model_path) else str(getattr(llm, "_hf_model_dir", None) or model_path)
    return {
        "model_path": os.path.abspath(folder) if os.path.isdir(folder) else folder,
        "tokens_per_block": int(setting_at(llm.args, "kv_cache_config.tokens_per_block", 32)),
        "context_length": int(length),
        "vocab_size": int(config.get("vocab_size", 0)),
        "eos_token_ids": [int(token) for token in ends],
    }


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            read = json.load(file)
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _refused(why: object) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2
