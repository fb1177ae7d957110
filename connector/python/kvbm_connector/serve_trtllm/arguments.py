"""What the command line says, and the engine's arguments that follow from it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any

DESCRIPTION = """
Serves a model with TensorRT-LLM as a worker of kvbm: the frontend of `kvbm up` or `kvbm frontend` finds it by the daemon's
registry and routes requests to it. Its KV cache is kept by the daemon, so it outlives the engine and is shared by all
engines of the node.
"""
EPILOG = """
example:
  python -m kvbm_connector.serve_trtllm --model-path /models/llama --served-model-name llama --extra-engine-args llm.yaml

Arguments of the engine (YAML or JSON, the fields of LLM()) are given to it as they are. Where they say nothing, the
connector of kvbm is used, and partial reuse of blocks and the engine's own host cache are off.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvbm_connector.serve_trtllm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="folder of the model, with its tokenizer, or its name")
    add("--served-model-name", help="what clients call it [default: last part of the path]")
    add("--extra-engine-args", metavar="FILE", help="arguments of the engine, YAML or JSON")
    add("--daemon", metavar="SOCKET", help="the daemon's socket [default: TLLM_KVBM_ENDPOINT, or that of `kvbm up`]")
    add("--worker-id", help="unique among the workers of the daemon [default: trtllm-PID]")
    add("--role", choices=("both", "prefill", "decode"), default="both", help="what it is used for [default: both]")
    add("--socket", help="where requests are taken [default: a file in the temporary folder]")
    add("--requests-max", type=_positive, default=1024, help="requests at a time; more are refused [default: 1024]")
    add("--drain-seconds", type=float, default=30.0, help="how long SIGTERM waits for answers [default: 30]")
    add("--lora", action="append", default=[], type=_pair, metavar="NAME=FOLDER", help="an adapter; may be repeated")
    add(
        "--logits-processor", action="append", default=[], type=_pair, metavar="NAME=MODULE:CLASS",
        help="a kvbm_connector.logits_processing.BaseLogitsProcessor that requests may name; may be repeated",
    )
    parsed = parser.parse_args(arguments)
    parsed.worker_id = parsed.worker_id or f"trtllm-{os.getpid()}"
    parsed.served_model_name = parsed.served_model_name or os.path.basename(os.path.normpath(parsed.model_path))
    parsed.socket = parsed.socket or os.path.join(tempfile.gettempdir(), f"kvbm-{parsed.worker_id}.sock")
    return parsed


def engine_arguments(path: str | None) -> dict[str, Any]:
    """The engine's arguments, with the connector where they name none."""
    arguments = _read(path) if path else {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: expected fields of LLM(), found {type(arguments).__name__}")
    arguments.setdefault(
        "kv_connector_config",
        {
            "connector_module": "kvbm_connector.trtllm",
            "connector_scheduler_class": "KvbmConnectorScheduler",
            "connector_worker_class": "KvbmConnectorWorker",
        },
    )
    cache = arguments.setdefault("kv_cache_config", {})
    if isinstance(cache, dict):
        cache.setdefault("enable_block_reuse", True)
        cache.setdefault("enable_partial_reuse", False)
        cache.setdefault("host_cache_size", 0)
    return arguments


def _read(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        # TensorRT-LLM has it among its requirements.
        import yaml
    except ImportError as error:
        raise ValueError(f"{path}: is no JSON, and YAML cannot be read here: {error}") from error
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not possible, at least 1")
    return number


def _pair(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not (name and is_pair and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value
