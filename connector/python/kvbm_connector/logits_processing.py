"""Processors of logits, for the worker over TensorRT-LLM: written once, without an engine's types.

    class Forbid(BaseLogitsProcessor):
        def __init__(self, token: int) -> None:
            self._token = token

        def __call__(self, input_ids, logits):
            logits[self._token] = float("-inf")

`python -m kvbm_connector.serve_trtllm --logits-processor forbid=my_module:Forbid` makes it known as `forbid`; a request
names it, with arguments as JSON.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

__all__ = ["BaseLogitsProcessor", "TrtllmLogitsAdapter", "create_trtllm_adapters"]


class BaseLogitsProcessor(ABC):
    """Changes the logits of one sequence in place."""

    @abstractmethod
    def __call__(self, input_ids: Sequence[int], logits: Any) -> None:
        """`input_ids`: prompt and answer so far. `logits`: a tensor with one number for each token of the vocabulary; it
        is changed in place, on the stream that is current, and what is returned is ignored."""


class TrtllmLogitsAdapter:
    """A processor as TensorRT-LLM calls it. One sequence per request: no beams."""

    def __init__(self, processor: BaseLogitsProcessor) -> None:
        self._processor = processor

    def __call__(
        self,
        req_id: int,
        logits: Any,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None = None,
    ) -> None:
        if len(token_ids) != 1:
            raise ValueError(f"request {req_id} has {len(token_ids)} sequences; logits processors need exactly one")
        row = logits
        while row.ndim > 1:
            if row.shape[0] != 1:
                raise ValueError(f"logits of request {req_id} have the shape {tuple(logits.shape)}; expected one sequence")
            row = row[0]
        with _on_stream(stream_ptr):
            self._processor(token_ids[0], row)


def create_trtllm_adapters(processors: Iterable[BaseLogitsProcessor]) -> list[TrtllmLogitsAdapter]:
    """For `SamplingParams.logits_processor`, in the same order."""
    return [TrtllmLogitsAdapter(processor) for processor in processors]


def _on_stream(stream_ptr: int | None) -> Any:
    if stream_ptr is None:
        return nullcontext()
    # An engine that names a stream has brought torch.
    import torch

    return torch.cuda.stream(torch.cuda.ExternalStream(stream_ptr))
