"""Requests that end in every way, blocks that change hands, engines that come and go."""

from __future__ import annotations

from ..engine import Engine
from ..retention import Retention, TokenRange
from .context import Context, scenario


def _takers(ctx: Context, engine: Engine, blocks: int) -> list[int]:
    """Requests that take the blocks that just became free, and live for a while."""
    size = engine.config.tokens_per_block
    half = max(1, blocks // 2)
    return [engine.submit(ctx.tokens(half * size - 3), 12) for _ in range(2)]


@scenario
def async_save(ctx: Context) -> None:
    """A pool so small that the next request needs the blocks whose save is under way."""
    engine = ctx.engine(pages=12, save_ms=2)
    prompts = [ctx.tokens(ctx.random.randrange(30, 60)) for _ in range(5)]
    for prompt in prompts:
        engine.submit(prompt, ctx.random.randrange(2, 20))
    engine.run()
    for prompt in prompts[::2]:
        ctx.warm(engine, prompt)


@scenario
def idle_save(ctx: Context) -> None:
    """After the last request nothing polls: the save goes on by itself, and another engine finds it."""
    engine = ctx.engine(save_ms=2)
    prompt = ctx.tokens(50)
    ctx.ask(engine, prompt, 5)
    engine.idle(0.3)
    other = ctx.engine()
    ctx.until_hit(other, prompt, ctx.whole(other, prompt), lambda: other.idle(0.05))
    ctx.ask(engine, ctx.tokens(20))


@scenario
def stop_words(ctx: Context) -> None:
    """Requests that end early. With overlap they are launched once more, and their end is told twice."""
    engine = ctx.engine(save_ms=3, pages=64)
    prompts = [ctx.tokens(ctx.random.randrange(9, 30)) for _ in range(4)]
    for prompt in prompts:
        engine.submit(prompt, 40, stop_after=ctx.random.randrange(1, 20))
    engine.submit(ctx.tokens(20), 40)
    engine.run()
    for prompt in prompts[:2]:
        ctx.warm(engine, prompt)


@scenario
def cancel_queued(ctx: Context) -> None:
    engine = ctx.engine(pages=12)
    engine.submit(ctx.tokens(40), 30)
    queued = engine.submit(ctx.tokens(40), 30)
    engine.step(3)
    engine.cancel(queued)
    engine.run()
    ctx.expect(engine.status(queued).state == "cancelled", "a queued request was not cancelled")


@scenario
def cancel_parked(ctx: Context) -> None:
    """A load is under way, its request vanishes without a callback, and its blocks have new owners at once."""
    engine = ctx.engine(pages=16, load_ms=2)
    prompt = ctx.tokens(97)
    ctx.ask(engine, prompt)
    ctx.warm(engine, prompt)
    for turn in range(3):
        ctx.flush(engine)
        parked = engine.submit(prompt, 8)
        if turn == 0:
            engine.cancel_when_parked(parked)
        else:
            engine.run_until(lambda parked=parked: engine.status(parked).state != "waiting")  # type: ignore[misc]
            engine.step(turn)
            engine.cancel(parked)
        engine.run(parked)
        takers = _takers(ctx, engine, 14)
        engine.run(*takers)
        engine.idle(0.03)
        engine.audit()
    ctx.warm(engine, prompt)


@scenario
def cancel_prefill(ctx: Context) -> None:
    """Requests vanish between chunks, with saves of their first blocks under way."""
    engine = ctx.engine(pages=20, chunk_tokens=16, save_ms=3)
    kept = []
    for _ in range(4):
        prompt = ctx.tokens(100)
        request = engine.submit(prompt, 8)
        engine.step(ctx.random.randrange(1, 5))
        engine.cancel(request)
        engine.step()
        engine.run(*_takers(ctx, engine, 18))
        kept.append(prompt)
    for prompt in kept:
        ctx.flush(engine)
        ctx.ask(engine, prompt)


@scenario
def cancel_decode(ctx: Context) -> None:
    """Requests vanish while decoding; what was saved of them is right or not there."""
    engine = ctx.engine(pages=24, save_ms=3)
    for _ in range(3):
        prompt = ctx.tokens(ctx.random.randrange(33, 60))
        request = engine.submit(prompt, 60)
        engine.step(ctx.random.randrange(2, 30))
        engine.cancel(request)
        engine.step()
        said = list(engine.status(request).generated)
        engine.forget_cache()
        engine.run(*_takers(ctx, engine, 20))
        ctx.flush(engine)
        ctx.ask(engine, prompt + said)


@scenario
def cancel_saving(ctx: Context) -> None:
    """A cancel that comes when the request is over and its save is under way."""
    engine = ctx.engine(save_ms=5)
    prompt = ctx.tokens(50)
    request = engine.submit(prompt, 4)
    other = engine.submit(ctx.tokens(12), 30)
    engine.run(request)
    engine.cancel(request)
    engine.run(other)
    ctx.warm(engine, prompt)


@scenario
def finish_and_reuse(ctx: Context) -> None:
    """Ended requests' blocks are wanted at once: a late read of them is of the next owner's bytes."""
    engine = ctx.engine(pages=14, save_ms=2)
    prompts = [ctx.tokens(ctx.random.randrange(70, 100)) for _ in range(4)]
    for prompt in prompts:
        engine.submit(prompt, 3)
    engine.run()
    for prompt in prompts:
        engine.forget_cache()
        ctx.ask(engine, prompt)
        engine.forget_cache()
        ctx.ask(engine, prompt)


@scenario
def vanishing(ctx: Context) -> None:
    """Many requests, most of which are cancelled at any time, then the cache still works."""
    engine = ctx.engine(pages=40, load_ms=1, save_ms=1, chunk_tokens=ctx.random.choice([None, 16]))
    bases = [ctx.tokens(48) for _ in range(3)]
    alive: list[int] = []
    for _ in range(40):
        base = ctx.random.choice(bases)
        alive.append(engine.submit(base[: ctx.random.randrange(8, 48)] + ctx.tokens(5), 10))
        if ctx.random.random() < 0.7:
            engine.cancel(alive.pop(ctx.random.randrange(len(alive))))
        engine.step(ctx.random.randrange(1, 4))
    engine.run()
    ctx.warm(engine, bases[0])


@scenario
def mixed(ctx: Context) -> None:
    """Everything at once, as the seed has it."""
    random = ctx.random
    engine = ctx.engine(
        pages=random.choice([24, 40, 64]),
        chunk_tokens=random.choice([None, 16, 32]),
        partial_reuse=random.random() < 0.5 and ctx.options.api == "L1",
        graphs=random.random() < 0.5,
        window=24 if ctx.options.api == "L2" and random.random() < 0.5 else None,
        empty_metadata=random.random() < 0.3,
        load_ms=random.choice([0, 1]),
        save_ms=random.choice([0, 1]),
    )
    bases = [ctx.tokens(random.randrange(8, 80)) for _ in range(4)]
    alive: list[int] = []
    for _ in range(50):
        base = random.choice(bases)
        prompt = base[: random.randrange(1, len(base))] + ctx.tokens(random.randrange(1, 12))
        more = {"stop_after": random.randrange(1, 10)} if random.random() < 0.3 else {}
        scope = {"cache_salt": random.choice([None, "s"]), "lora_task_id": random.choice([None, None, 3])}
        drafts = random.choice([0, 0, 0, 3])
        alive.append(engine.submit(prompt, random.randrange(1, 25), draft_tokens=drafts, **more, **scope))
        if random.random() < 0.25:
            engine.cancel(alive.pop(random.randrange(len(alive))))
        if random.random() < 0.1:
            engine.forget_cache()
        engine.step(random.randrange(1, 6))
    engine.run()


@scenario
def pressure(ctx: Context) -> None:
    """The cache is full and evicts while loads are under way: what was offered is kept until it was loaded."""
    first, engine = ctx.engine(capacity=14), ctx.engine(pages=60, capacity=14, load_ms=12)
    for _ in range(3):
        prompt = ctx.tokens(65)
        ctx.ask(first, prompt)
        first.idle(0.2)
        engine.submit(prompt, 3)
        for _ in range(3):
            engine.submit(ctx.tokens(90), 2)
        engine.run()
        engine.idle(0.3)


@scenario
def priorities(ctx: Context) -> None:
    """Requests with retention ranges and without, decode blocks too: lists match the blocks."""
    engine = ctx.engine(pages=64)
    ranges = (TokenRange(0, 16, 90), TokenRange(16, None, 10))
    for retention in (Retention(ranges, decode_priority=5), None, Retention()):
        prompt = ctx.tokens(40)
        ctx.ask(engine, prompt, 20, retention=retention)
        ctx.warm(engine, prompt, retention=retention)


@scenario
def two_engines(ctx: Context) -> None:
    """Two engines share a prefix; one is killed in the middle of its work and the next finds it again."""
    first, second = ctx.engine(save_ms=1), ctx.engine()
    prompt = ctx.tokens(60)
    ctx.ask(first, prompt, 10)
    ctx.until_hit(second, prompt, ctx.whole(second, prompt), lambda: ctx.flush(second))
    first.submit(ctx.tokens(80), 30)
    first.submit(prompt, 30)
    first.step(ctx.random.randrange(1, 12))
    first.kill()
    again = ctx.engine()
    ctx.until_hit(again, prompt, ctx.whole(again, prompt), lambda: ctx.flush(again))
    ctx.ask(second, prompt)


@scenario
def refused_setups(ctx: Context) -> None:
    """What the executor cannot do with a connector does not start."""
    for option, value in (
        ("kv_cache_config.host_cache_size", 1 << 30),
        ("max_beam_width", 2),
        ("enable_attention_dp", True),
        ("parallel_config.mapping.pp_size", 2),
    ):
        engine = ctx.try_engine(model_options={option: value})
        ctx.expect(engine is None, f"an engine with {option} = {value} started")
