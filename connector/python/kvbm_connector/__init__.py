"""Connects an LLM engine to kvbm, the daemon that keeps the KV-cache blocks of all engines of a node.

Importing this package needs no engine, no torch and no CUDA. The adapters are modules of it: `kvbm_connector.trtllm`
and `kvbm_connector.vllm`.
"""

from ._native import Engine, model_fingerprint, socket_of

__all__ = ["Engine", "model_fingerprint", "socket_of"]
