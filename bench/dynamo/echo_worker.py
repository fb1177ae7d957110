"""A worker for Dynamo that computes nothing: it says the same token until it has said enough. `echo_worker.py MODEL`.

With ECHO_STEP_MS each step takes so long, for all that speak together, as in kvbm's echo engine.
"""

import asyncio
import os
import sys

import uvloop
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime, dynamo_worker

TOKEN = 70
STEP_SECONDS = float(os.environ.get("ECHO_STEP_MS", "0")) / 1000


class Steps:
    """The end of each step, for whoever waits for it."""

    def __init__(self):
        self.end = None

    async def next(self) -> None:
        if self.end is None:
            self.end = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(STEP_SECONDS, self.over)
        await asyncio.shield(self.end)

    def over(self) -> None:
        end, self.end = self.end, None
        end.set_result(None)


steps = Steps()


async def answer(request, context=None):
    count = (request.get("stop_conditions") or {}).get("max_tokens") or 1
    for left in range(count, 0, -1):
        if STEP_SECONDS:
            await steps.next()
        yield {"token_ids": [TOKEN]} | ({"finish_reason": "length"} if left == 1 else {})


@dynamo_worker()
async def main(runtime: DistributedRuntime):
    endpoint = runtime.endpoint("dynamo.backend.generate")
    kinds = ModelType.Chat | ModelType.Completions
    await register_model(
        ModelInput.Tokens, kinds, endpoint, sys.argv[1], "tiny",
        worker_type=WorkerType.Aggregated, kv_cache_block_size=32)
    await endpoint.serve_endpoint(answer, graceful_shutdown=False)


if __name__ == "__main__":
    uvloop.run(main())
