"""A real engine in a process of its own, which does what it is told over a connection.

`engine.py` is the other side.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Client
from typing import Any

# The scheduler runs in this process, so that the test can look at it; the worker has a process of its own anyway.
os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", PYTHONHASHSEED="0", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


class Served:
    def __init__(self, model: str, connector: str, extra: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            enforce_eager=True,
            max_model_len=2048,
            dtype="bfloat16",
            block_size=32,
            seed=0,
            max_num_seqs=16,
            worker_extension_cls="recorded.WorkerExtension",
            disable_hybrid_kv_cache_manager=True,
            kv_transfer_config={
                "kv_connector": connector,
                "kv_connector_module_path": "recorded",
                "kv_role": "kv_both",
                "kv_connector_extra_config": extra,
            },
        )

    def generate(self, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
        from recorded import ended
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=2)
        given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = []
        for output in self.llm.generate(given, params, use_tqdm=False):
            made = output.outputs[0]
            best = [sorted((one.logprob for one in step.values()), reverse=True)[:2] for step in made.logprobs]
            name = next(name for name in reversed(ended) if name.split("-")[0] == output.request_id.split("-")[0])
            whole = (len(output.prompt_token_ids) + len(made.token_ids) - 1) // 32
            sums = self.llm.collective_rpc("block_checksums", args=(ended[name][:whole],))[0]
            results.append(
                {
                    "tokens": list(made.token_ids),
                    "cached": output.num_cached_tokens,
                    "sums": sums,
                    "gaps": [step[0] - step[1] for step in best],
                }
            )
        return results

    def reset(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def figures(self) -> dict[str, dict[str, Any]]:
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        worker = self.llm.collective_rpc("connector_figures")[0]
        return {"scheduler": connector.figures(), "worker": worker}


def main() -> None:
    address, model, connector, extra = sys.argv[1:]
    served = Served(model, connector, json.loads(extra))
    with Client(address) as pipe:
        while True:
            try:
                what, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(served, what)(*arguments))


if __name__ == "__main__":
    main()
