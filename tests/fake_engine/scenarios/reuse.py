"""What was computed once is found again, under every way of computing it."""

from __future__ import annotations

from .context import Context, only, scenario


@scenario
def cold_warm(ctx: Context) -> None:
    """Prompts of all lengths around block boundaries: nothing, then everything but the last token."""
    engine = ctx.engine()
    size = engine.config.tokens_per_block
    prompts = [ctx.tokens(blocks * size + more) for blocks, more in ((1, 0), (2, 1), (3, 0), (4, size - 1), (1, 3))]
    for prompt in prompts:
        cold = ctx.ask(engine, prompt, max_new_tokens=ctx.random.randrange(1, 12))
        ctx.expect(cold.offered == 0, f"a new prompt was offered {cold.offered} tokens")
    ctx.random.shuffle(prompts)
    for prompt in prompts:
        ctx.warm(engine, prompt)


@scenario
def conversation(ctx: Context) -> None:
    """Each turn brings the last prompt and its answer: blocks that were filled while decoding count too."""
    engine = ctx.engine(pages=64)
    prompt = ctx.tokens(ctx.random.randrange(9, 30))
    for _ in range(3):
        status = ctx.ask(engine, prompt, max_new_tokens=ctx.random.randrange(12, 40))
        # The last token said has no KV.
        prompt = prompt + list(status.generated)
        # Another end each time: the first time may be too early, and would bring a block with its own end.
        ctx.warm_prefix(engine, prompt[: (len(prompt) - 1) // 8 * 8], 2)
        prompt = prompt[:-1] + ctx.tokens(3)


@scenario
def graphs(ctx: Context) -> None:
    """CUDA graphs: no per-layer hook fires while decoding."""
    engine = ctx.engine(graphs=True, pages=64)
    ctx.continued(engine, [13], 30)


@scenario
def chunked_prefill(ctx: Context) -> None:
    """Offers that end inside the first chunk, at its end and behind it."""
    engine = ctx.engine(chunk_tokens=ctx.random.choice([16, 24, 32]), pages=64)
    size = engine.config.tokens_per_block
    base = ctx.tokens(12 * size)
    ctx.ask(engine, base)
    ctx.warm(engine, base)
    for blocks in (1, 2, 3, 5, 9, 11):
        ctx.warm_prefix(engine, base[: blocks * size], ctx.random.randrange(2, 7 * size))
    together = [base[: n * size] + ctx.tokens(20) for n in (2, 4)]
    ctx.flush(engine)
    for prompt in together:
        engine.submit(prompt, 5)
    engine.run()


@scenario
def decode_boundaries(ctx: Context) -> None:
    """Several requests decode across block boundaries at different places."""
    engine = ctx.engine(pages=80)
    ctx.continued(engine, [8 + offset for offset in range(8)], 26)


@scenario
def same_middle(ctx: Context) -> None:
    """Equal blocks behind different prefixes are different blocks."""
    engine = ctx.engine()
    middle = ctx.tokens(24)
    first, second = ctx.tokens(8), ctx.tokens(8)
    ctx.ask(engine, first + middle)
    ctx.warm(engine, first + middle)
    status = ctx.ask(engine, second + middle)
    ctx.expect(status.offered == 0, f"{status.offered} tokens offered for a prefix that was never computed")
    ctx.ask(engine, middle)
    ctx.warm(engine, second + middle)
    ctx.warm(engine, middle)


@scenario
def concurrent_prefix(ctx: Context) -> None:
    """The same prefix in several requests at once, cold and then loaded by all of them."""
    engine = ctx.engine(pages=96, load_ms=1)
    base = ctx.tokens(33)
    for _ in range(3):
        ids = [engine.submit(base + ctx.tokens(4), 6) for _ in range(4)]
        engine.run(*ids)
        ctx.warm(engine, base)
        ctx.flush(engine)


@scenario
def watched(ctx: Context) -> None:
    """Somebody reads the connector's figures all the while: no callback waits for that for ever."""
    engine = ctx.engine(watched=True, pages=64)
    prompts = [ctx.tokens(ctx.random.randrange(20, 50)) for _ in range(5)]
    for prompt in prompts * 2:
        ctx.warm(engine, prompt)


@scenario
def partial_reuse(ctx: Context) -> None:
    """The engine itself finds a prefix that ends inside a block, copies the block or takes it over."""
    engine = ctx.engine(partial_reuse=True)
    base = ctx.tokens(30)
    ctx.ask(engine, base, 20)
    for cut in (3, 11, 13, 21, 27):
        ctx.ask(engine, base[:cut] + ctx.tokens(17), 12)
    ids = [engine.submit(base[:cut] + ctx.tokens(9), 10) for cut in (5, 12, 19)]
    engine.run(*ids)
    for cut in (16, 24):
        prompt = base[:cut] + ctx.tokens(5)
        ctx.flush(engine)
        ctx.ask(engine, prompt)


@scenario
def speculative(ctx: Context) -> None:
    """Draft tokens are written and then rejected, also across block boundaries."""
    engine = ctx.engine(pages=96)
    prompts = [ctx.tokens(ctx.random.randrange(8, 20)) for _ in range(4)]
    ids = [engine.submit(prompt, 30, draft_tokens=ctx.random.randrange(1, 6)) for prompt in prompts]
    engine.run(*ids)
    for prompt, request in zip(prompts, ids, strict=True):
        said = list(engine.status(request).generated)
        ctx.expect(len(said) == 30, f"{len(said)} tokens said")
        whole = prompt + said[:-1]
        ctx.warm_prefix(engine, whole[: len(whole) // 8 * 8], 2)
    ctx.continued(engine, [9, 14], 30, draft_tokens=3)


@scenario
def context_only(ctx: Context) -> None:
    """Requests that end with their prompt, as a prefill server has them."""
    engine = ctx.engine()
    prompts = [ctx.tokens(length) for length in (17, 24, 40)]
    for prompt in prompts:
        ctx.ask(engine, prompt, context_only=True)
    for prompt in prompts:
        ctx.warm(engine, prompt, context_only=True)


@scenario
def reuse_off(ctx: Context) -> None:
    """L1 without block reuse: nothing is asked, metadata and ends go on. L2 asks all the same."""
    engine = ctx.engine(block_reuse=False)
    prompt = ctx.tokens(30)
    for _ in range(2):
        ctx.ask(engine, prompt, 12)
    engine.leave()
    asked = engine.counts.get("get_num_new_matched_tokens", 0)
    ctx.expect(asked == (0 if ctx.options.api == "L1" else 2), f"asked {asked} times")
    ctx.expect(engine.counts["request_finished"] == 2, "an end was not told")


@scenario
def empty_metadata(ctx: Context) -> None:
    """None and empty bytes are bound before the real metadata."""
    engine = ctx.engine(empty_metadata=True)
    prompt = ctx.tokens(29)
    ctx.ask(engine, prompt)
    ctx.warm(engine, prompt)


@only("L2")
def sliding_window(ctx: Context) -> None:
    """Two layer groups; pages that a window has left are -1 and belong to others."""
    engine = ctx.engine(window=24, pages=64, chunk_tokens=ctx.random.choice([None, 16, 32]))
    prompt = ctx.tokens(90)
    status = ctx.ask(engine, prompt, 30)
    ids = [engine.submit(ctx.tokens(40), 30) for _ in range(2)]
    engine.run(*ids)
    ctx.warm(engine, prompt)
    whole = prompt + list(status.generated[:-1])
    ctx.flush(engine)
    ctx.ask(engine, [*whole, 1])
    for blocks in (2, 5, 7):
        ctx.flush(engine)
        ctx.ask(engine, prompt[: blocks * 8] + ctx.tokens(11), 9)


@only("L2")
def preempted(ctx: Context) -> None:
    """Blocks run out: requests are sent back and come again as new ones."""
    engine = ctx.engine(max_utilization=True, pages=14, overlap=False)
    prompts = [ctx.tokens(ctx.random.randrange(14, 22)) for _ in range(4)]
    ids = [engine.submit(prompt, 30) for prompt in prompts]
    engine.run(*ids)
    for request in ids:
        ctx.expect(len(engine.status(request).generated) == 30, "a request sent back lost tokens")


@only("L2")
def short_commit(ctx: Context) -> None:
    """The engine takes less of an offer than was offered, even nothing; a load's result is computed again."""
    engine = ctx.engine(short_commit=True, chunk_tokens=ctx.random.choice([None, 16]), load_ms=1)
    prompts = [ctx.tokens(length) for length in (25, 41, 60)]
    for prompt in prompts:
        ctx.ask(engine, prompt)
    for prompt in prompts * 2:
        ctx.warm(engine, prompt)
