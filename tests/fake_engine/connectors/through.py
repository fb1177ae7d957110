"""Any connector of the flat interface, with each call written down: `record:/path?module=M&scheduler=S&worker=W&url=U`.

The connector is the inner one, with its own answers; what is written is what the recording connector writes.
"""

from __future__ import annotations

import copy
import importlib
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from .recording import note

_lock = threading.Lock()
_inner_args: dict[int, tuple[Any, Any]] = {}


def _inside(llm_args: Any) -> Any:
    """The settings as the inner connector is to see them; both halves of a rank see the same object."""
    with _lock:
        known = _inner_args.get(id(llm_args))
        if known is None:
            inner = copy.copy(llm_args)
            inner.kv_connector_config = copy.copy(llm_args.kv_connector_config)
            inner.kv_connector_config.server_url = _settings(llm_args)["url"][0]
            _inner_args[id(llm_args)] = known = (llm_args, inner)
        return known[1]


def _settings(llm_args: Any) -> dict[str, list[str]]:
    return parse_qs(urlparse(llm_args.kv_connector_config.server_url).query)


class _Through:
    def __init__(self, llm_args: Any, half: str) -> None:
        self._path = Path(urlparse(llm_args.kv_connector_config.server_url).path)
        settings = _settings(llm_args)
        module = importlib.import_module(settings["module"][0])
        self._inner = getattr(module, settings[half][0])(_inside(llm_args))

    def note(self, call: str, **what: Any) -> None:
        note(self._path, call, **what)


class Scheduler(_Through):
    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args, "scheduler")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        self.note("query", id=request.request_id, local=num_computed_tokens)
        answer: tuple[int, bool] = self._inner.get_num_new_matched_tokens(request, num_computed_tokens)
        return answer

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        matched = request.py_num_connector_matched_tokens
        self.note("alloc", id=request.request_id, blocks=block_ids, matched=matched)
        self._inner.update_state_after_alloc(request, block_ids)

    def build_connector_meta(self, output: Any) -> object:
        self.note("meta", new=[vars(r) for r in output.new_requests], cached=[vars(r) for r in output.cached_requests])
        return self._inner.build_connector_meta(output)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        self.note("finished", id=request.request_id, blocks=cache_block_ids)
        keep: bool = self._inner.request_finished(request, cache_block_ids)
        return keep


class Worker(_Through):
    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args, "worker")

    def register_forward_pass_callable(self) -> Any:
        inner = self._inner.register_forward_pass_callable()

        def called() -> None:
            self.note("forward")
            if inner is not None:
                inner()

        return called

    def register_kv_caches(self, tensor: Any) -> None:
        self.note("register", shape=list(tensor.shape))
        self._inner.register_kv_caches(tensor)

    def bind_connector_meta(self, metadata: object) -> None:
        self._inner.bind_connector_meta(metadata)

    def start_load_kv(self, stream: Any) -> None:
        self.note("start_load")
        self._inner.start_load_kv(stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self.note("wait_layer", layer=layer_idx)
        self._inner.wait_for_layer_load(layer_idx, stream)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self.note("save_layer", layer=layer_idx)
        self._inner.save_kv_layer(layer_idx, stream)

    def wait_for_save(self, stream: Any) -> None:
        self.note("wait_save")
        self._inner.wait_for_save(stream)

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        self.note("get_finished", saving=finished, loading=started)
        saved, loaded = self._inner.get_finished(finished, started)
        return list(saved), list(loaded)
