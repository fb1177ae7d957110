"""From requests of frontends to arguments of `LLM.generate_async`.

What an engine of this version cannot do is refused by the name of the field, never left out: a salt that is ignored
would show one client's cache to another. Only retention is advice, and is left out with one line of log.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..logits_processing import BaseLogitsProcessor, create_trtllm_adapters

_log = logging.getLogger(__name__)

# Where versions have a name.
_PLACES = {
    "SamplingParams": ("tensorrt_llm", "tensorrt_llm.sampling_params"),
    "KvCacheRetentionConfig": ("tensorrt_llm.llmapi", "tensorrt_llm.bindings.executor"),
    "SchedulingParams": ("tensorrt_llm.scheduling_params", "tensorrt_llm.llmapi"),
    "LoRARequest": ("tensorrt_llm.executor.request", "tensorrt_llm.executor"),
}


def named(name: str) -> Any:
    """Something of TensorRT-LLM's, or ValueError."""
    for place in _PLACES[name]:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            continue
    raise ValueError(f"this version of TensorRT-LLM has no {name}")


class Requests:
    """`loras`: folders by name. `processors`: `module:class` by name, loaded now so that a typing error is told at once."""

    def __init__(
        self, generate_async: Callable[..., Any], loras: Iterable[tuple[str, str]], processors: Iterable[tuple[str, str]]
    ) -> None:
        parameters = inspect.signature(generate_async).parameters
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        self._takes: Callable[[str], bool] = lambda name: takes_all or name in parameters
        # Numbers of adapters follow the command line: engines started alike give the same numbers.
        self._loras = {name: (number, folder) for number, (name, folder) in enumerate(loras, 1)}
        self._processors = {name: _processor_class(path) for name, path in processors}
        self._told = False

    def arguments(self, request: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate_async`. ValueError, with the field's name: it can never be served."""
        prompt = list(request["prompt"]) + list(request["generated"])
        inputs: dict[str, Any] = {"prompt_token_ids": prompt}
        if request["multimodal"]:
            inputs["multi_modal_data"] = _media(request["multimodal"])
        arguments: dict[str, Any] = {
            "inputs": inputs,
            "sampling_params": self._sampling(request),
            "streaming": True,
        }
        salt = salt_of(request["tenant"], request["cache_salt"])
        if salt is not None:
            self._set(arguments, "cache_salt", salt)
        if request["lora"] is not None:
            self._set(arguments, "lora_request", self._lora(request["lora"]), field="lora")
        if request["dp_rank"] is not None:
            scheduling = named("SchedulingParams")(attention_dp_rank=request["dp_rank"], attention_dp_relax=False)
            self._set(arguments, "scheduling_params", scheduling, field="dp_rank")
        if request["retention"] is not None:
            self._retention(arguments, request["retention"])
        return arguments

    def _set(self, arguments: dict[str, Any], name: str, value: Any, field: str = "") -> None:
        if not self._takes(name):
            raise ValueError(f"{field or name}: this version of TensorRT-LLM has no {name} in generate_async")
        arguments[name] = value

    def _sampling(self, request: dict[str, Any]) -> Any:
        chosen: dict[str, Any] = {
            "max_tokens": request["max_tokens"] - len(request["generated"]),
            "ignore_eos": request["ignore_eos"],
            "detokenize": False,
            # Frontends are told the token that ended the answer.
            "include_stop_str_in_output": True,
        }
        if request["stop_token_ids"]:
            chosen["stop_token_ids"] = list(request["stop_token_ids"])
        for field in request["untranslated"]:
            raise ValueError(f"{field}: not supported by workers over TensorRT-LLM")
        if request["temperature"] > 0:
            chosen["temperature"] = request["temperature"]
            chosen.update({name: request[name] for name in ("top_p", "top_k", "min_p") if request[name]})
        else:
            chosen["top_k"] = 1
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if request[name]:
                if request["generated"]:
                    raise ValueError(f"{name}: the engine cannot tell what was generated elsewhere from the prompt")
                chosen[name] = request[name]
        if request["min_tokens"] > len(request["generated"]):
            chosen["min_tokens"] = request["min_tokens"] - len(request["generated"])
        if request["seed"] is not None:
            chosen["seed"] = request["seed"]
        if request["logits_processors"]:
            made = [self._processor(name, text) for name, text in request["logits_processors"]]
            chosen["logits_processor"] = create_trtllm_adapters(made)
        return named("SamplingParams")(**chosen)

    def _processor(self, name: str, text: str) -> BaseLogitsProcessor:
        made = self._processors.get(name)
        if made is None:
            known = ", ".join(sorted(self._processors)) or "none"
            raise ValueError(f"logits_processors: {name!r} is not known to this worker, which has {known}")
        try:
            arguments = json.loads(text) if text else {}
            return made(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"logits_processors: {name}: {error}") from error

    def _lora(self, name: str) -> Any:
        if name not in self._loras:
            known = ", ".join(sorted(self._loras)) or "none"
            raise ValueError(f"lora: {name!r} is not known to this worker, which has {known}")
        number, folder = self._loras[name]
        return named("LoRARequest")(name, number, folder)

    def _retention(self, arguments: dict[str, Any], retention: dict[str, Any]) -> None:
        if not self._takes("kv_cache_retention_config"):
            if not self._told:
                self._told = True
                _log.warning("this version of TensorRT-LLM takes no retention; it is left out")
            return
        arguments["kv_cache_retention_config"] = retention_of(retention)


def retention_of(retention: dict[str, Any]) -> Any:
    config = named("KvCacheRetentionConfig")
    ranges = [
        config.TokenRangeRetentionConfig(start, end, 35 if priority is None else priority, _duration(ms))
        for start, end, priority, ms in retention["ranges"]
    ]
    decode = retention["decode_retention_priority"]
    return config(ranges, 35 if decode is None else decode, _duration(retention["decode_duration_ms"]))


def salt_of(tenant: str | None, salt: str | None) -> str | None:
    """One salt for both: no two pairs of tenant and salt have the same one."""
    if not tenant and not (salt or "").startswith("tenant:"):
        return salt
    return "tenant:" + json.dumps([tenant or "", salt or ""])


def _duration(milliseconds: int | None) -> Any:
    from datetime import timedelta

    return None if milliseconds is None else timedelta(milliseconds=milliseconds)


def _media(inputs: list[tuple[str, str]]) -> dict[str, list[Any]]:
    loaded: dict[str, list[Any]] = {}
    for modality, url in inputs:
        try:
            load = getattr(importlib.import_module("tensorrt_llm.inputs.utils"), f"load_{modality}")
        except (ImportError, AttributeError) as error:
            raise ValueError(f"multimodal: this version of TensorRT-LLM loads no {modality!r}") from error
        try:
            loaded.setdefault(modality, []).append(load(url))
        except Exception as error:
            raise ValueError(f"multimodal: load {modality} {url[:100]}: {error}") from error
    return loaded


def _processor_class(path: str) -> Callable[..., BaseLogitsProcessor]:
    module, _, name = path.partition(":")
    made = getattr(importlib.import_module(module), name, None)
    if not (isinstance(made, type) and issubclass(made, BaseLogitsProcessor)):
        raise ValueError(f"--logits-processor {path}: is no subclass of kvbm_connector.logits_processing.BaseLogitsProcessor")
    return made
