"""Stands for TensorRT-LLM in tests: its LLM API, over the fake engine. Only for processes that have no real one."""

from fake_engine.llm_api import LLM, SamplingParams, publish

publish()

__all__ = ["LLM", "SamplingParams"]
