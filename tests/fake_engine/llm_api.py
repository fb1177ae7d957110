"""TensorRT-LLM's LLM API, as far as a worker uses it, over one fake engine of this process's children.

What it was asked is written to the file that FAKE_TRTLLM_RECORD names, a JSON object per line, so that tests see what
arrived.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from .config import ConnectorNames, EngineConfig
from .engine import Engine, EngineGone
from .retention import Retention, TokenRange
from .stub_modules import publish as publish_module

CONTEXT_LENGTH = 1024
TOKENS_PER_BLOCK = 8


@dataclass
class SamplingParams:
    max_tokens: int = 32
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    include_stop_str_in_output: bool = False
    logits_processor: Any = None


@dataclass
class TokenRangeRetentionConfig:
    token_start: int
    token_end: int | None = None
    priority: int = 35
    duration_ms: timedelta | None = None


@dataclass
class KvCacheRetentionConfig:
    token_range_retention_configs: list[TokenRangeRetentionConfig]
    decode_retention_priority: int = 35
    decode_duration_ms: timedelta | None = None

    TokenRangeRetentionConfig = TokenRangeRetentionConfig


@dataclass
class SchedulingParams:
    attention_dp_rank: int | None = None
    attention_dp_relax: bool | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


def publish() -> None:
    """The modules where these names are looked for."""
    publish_module("tensorrt_llm.llmapi", KvCacheRetentionConfig=KvCacheRetentionConfig, SamplingParams=SamplingParams)
    publish_module("tensorrt_llm.scheduling_params", SchedulingParams=SchedulingParams)
    publish_module("tensorrt_llm.executor.request", LoRARequest=LoRARequest)
    publish_module("tensorrt_llm.inputs.utils", load_image=lambda url: f"the image at {url}")


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class RequestOutput:
    """Pieces of an answer as they come."""

    def __init__(self, llm: LLM, request_id: int, sampling: SamplingParams, prompt: list[int]) -> None:
        self.outputs = [CompletionOutput()]
        self.cached_tokens = 0
        self._llm = llm
        self._id = request_id
        self._sampling = sampling
        self._prompt = prompt
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[CompletionOutput | Exception] = asyncio.Queue()
        self._seen = 0

    def abort(self) -> None:
        self._llm.cancel(self._id)

    def said(self, ids: list[int], is_over: bool, cached: int) -> bool:
        """From the engine's thread. True when the answer has ended."""
        self.cached_tokens = cached
        stops = set(self._sampling.stop_token_ids or [])
        end = next((at + 1 for at, token in enumerate(ids) if token in stops), None)
        reason = None
        if end is not None:
            ids, reason = ids[:end], "stop"
        elif is_over:
            reason = "length" if len(ids) >= self._sampling.max_tokens else "cancelled"
        self._process(len(ids))
        if len(ids) > self._seen or reason is not None:
            self._seen = len(ids)
            self._put(CompletionOutput(list(ids), reason))
        return reason is not None

    def failed(self, error: Exception) -> None:
        self._put(error)

    def _process(self, count: int) -> None:
        """Logits processors are called, though nothing here is chosen by logits."""
        for position in range(self._seen, count):
            for processor in self._sampling.logits_processor or []:
                so_far = self._prompt + [0] * position
                processor(self._id, SimpleNamespace(ndim=1, shape=(8,)), [so_far], None, None)

    def _put(self, piece: CompletionOutput | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:
            # The loop is closed: nobody waits.
            pass

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            self.outputs = [piece]
            yield self
            if piece.finish_reason is not None:
                return


class LLM:
    def __init__(self, model: str, kv_connector_config: dict[str, str], **more: Any) -> None:
        names = ConnectorNames(
            kv_connector_config["connector_module"],
            kv_connector_config["connector_scheduler_class"],
            kv_connector_config["connector_worker_class"],
            kv_connector_config.get("server_url"),
        )
        # Not the model's folder: its configuration is of other layers.
        name = f"fake/{os.path.basename(model)}"
        self._engine = Engine(EngineConfig(names, tokens_per_block=TOKENS_PER_BLOCK, pages=256, model=name))
        if self._engine.dead:
            raise RuntimeError(f"the fake engine did not start: {self._engine.refused}")
        self.args = self._engine.config.llm_args(0)
        self.args.max_seq_len = CONTEXT_LENGTH  # type: ignore[attr-defined]
        self._record = os.environ.get("FAKE_TRTLLM_RECORD")
        self._asked: dict[int, RequestOutput] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def generate_async(
        self,
        inputs: dict[str, Any],
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        streaming: bool = False,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        cache_salt: str | None = None,
        scheduling_params: SchedulingParams | None = None,
    ) -> RequestOutput:
        sampling = sampling_params or SamplingParams()
        prompt = list(inputs["prompt_token_ids"])
        if len(prompt) + sampling.max_tokens > CONTEXT_LENGTH:
            raise ValueError(f"{len(prompt)} tokens and {sampling.max_tokens} more are over {CONTEXT_LENGTH}")
        if self._record:
            media, retention = inputs.get("multi_modal_data"), kv_cache_retention_config
            told = [str(each) for each in (media, lora_request, retention, cache_salt, scheduling_params)]
            with open(self._record, "a", encoding="utf-8") as file:
                file.write(json.dumps([prompt, *told]) + "\n")
        with self._changed:
            if self._closed or self._engine.dead:
                raise RuntimeError("the engine is gone")
            number = self._engine.submit(
                prompt,
                sampling.max_tokens,
                cache_salt=cache_salt,
                lora_task_id=lora_request.lora_int_id if lora_request else None,
                retention=_retention(kv_cache_retention_config),
            )
            output = RequestOutput(self, number, sampling, prompt)
            self._asked[number] = output
            self._changed.notify()
        return output

    def cancel(self, number: int) -> None:
        with self._changed:
            if self._asked.pop(number, None) is not None and not self._engine.dead:
                self._engine.cancel(number)
                self._changed.notify()

    def shutdown(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                self._engine.leave()
            except EngineGone:
                pass
            if self._engine.violations:
                raise AssertionError(f"{self._engine.violations[0]}")

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                try:
                    ran = self._engine.step()
                except EngineGone:
                    self._fail(RuntimeError(f"the engine died: {self._engine.violations[:1]}"))
                    return
                for number in list(self._asked):
                    status = self._engine.statuses.get(number)
                    if status is None:
                        continue
                    ids, is_over = list(status.generated), status.over or status.state == "finished"
                    if self._asked[number].said(ids, is_over, status.local + status.offered):
                        del self._asked[number]
                        if not is_over:
                            self._engine.cancel(number)
                            ran = True
                if not ran and not self._asked:
                    self._changed.wait()

    def _fail(self, error: Exception) -> None:
        for output in self._asked.values():
            output.failed(error)
        self._asked.clear()


def _retention(config: KvCacheRetentionConfig | None) -> Retention | None:
    if config is None:
        return None

    def seconds(duration: timedelta | None) -> float | None:
        return duration.total_seconds() if duration is not None else None

    ranges = tuple(
        TokenRange(each.token_start, each.token_end, each.priority, seconds(each.duration_ms))
        for each in config.token_range_retention_configs
    )
    return Retention(ranges, config.decode_retention_priority, seconds(config.decode_duration_ms))
