"""Writes down every call and answers as it is told: `record:/path?offer=16&async=1&keep=1`, for the golden counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse


def note(path: Path, call: str, **what: Any) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({"call": call} | what) + "\n")


class _Recorder:
    def __init__(self, llm_args: Any) -> None:
        parsed = urlparse(llm_args.kv_connector_config.server_url)
        settings = {name: int(values[0]) for name, values in parse_qs(parsed.query).items()}
        self.path = Path(parsed.path)
        self.offer = settings.get("offer", 0)
        self.asynchronous = bool(settings.get("async", 0))
        self.keep = bool(settings.get("keep", 0))

    def note(self, call: str, **what: Any) -> None:
        note(self.path, call, **what)


class Scheduler(_Recorder):
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        self.note("query", id=request.request_id, local=num_computed_tokens)
        return self.offer, self.asynchronous and self.offer > 0

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        matched = request.py_num_connector_matched_tokens
        self.note("alloc", id=request.request_id, blocks=block_ids, matched=matched)

    def update_state_after_alloc_by_layer_group(self, request: Any, groups: list[list[int]]) -> None:
        self.note("alloc_by_group", id=request.request_id, groups=groups)

    def build_connector_meta(self, output: Any) -> object:
        self.note("meta", new=[vars(r) for r in output.new_requests], cached=[vars(r) for r in output.cached_requests])
        return None

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        self.note("finished", id=request.request_id, blocks=cache_block_ids)
        return self.keep

    def request_finished_by_layer_group(self, request: Any, groups: list[list[int]]) -> bool:
        self.note("finished_by_group", id=request.request_id, groups=groups)
        return self.keep


class Worker(_Recorder):
    def register_forward_pass_callable(self) -> Any:
        return lambda: self.note("forward")

    def register_kv_caches(self, tensor: Any) -> None:
        self.note("register", shape=list(tensor.shape))

    def register_kv_cache_layout(self, layout: Any) -> None:
        self.note("register_layout", groups=[group.layer_ids for group in layout.groups])

    def bind_connector_meta(self, metadata: object) -> None:
        return None

    def start_load_kv(self, stream: Any) -> None:
        self.note("start_load")

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self.note("wait_layer", layer=layer_idx)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self.note("save_layer", layer=layer_idx)

    def wait_for_save(self, stream: Any) -> None:
        self.note("wait_save")

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        self.note("get_finished", saving=finished, loading=started)
        return list(finished), list(started)
