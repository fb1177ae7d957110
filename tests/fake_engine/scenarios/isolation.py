"""Equal tokens whose KV is not equal."""

from __future__ import annotations

from ..request import MultimodalItem
from .context import Context, scenario


@scenario
def salt_isolation(ctx: Context) -> None:
    """No salt sees the blocks of another, and each sees its own."""
    engine = ctx.engine()
    prompt = ctx.tokens(35)
    for salt in (None, "a", "b"):
        status = ctx.ask(engine, prompt, cache_salt=salt)
        ctx.expect(status.offered == 0 and status.local == 0, f"salt {salt} was offered {status.offered} tokens")
        ctx.warm(engine, prompt, cache_salt=salt)
    for salt in (None, "a", "b"):
        ctx.warm(engine, prompt, cache_salt=salt)


@scenario
def lora_isolation(ctx: Context) -> None:
    """The same for LoRA adapters, with and without a salt."""
    engine = ctx.engine()
    prompt = ctx.tokens(35)
    for lora in (None, 1, 2):
        for salt in (None, "a"):
            status = ctx.ask(engine, prompt, lora_task_id=lora, cache_salt=salt)
            ctx.expect(status.offered == 0, f"LoRA {lora}, salt {salt} was offered {status.offered} tokens")
            ctx.warm(engine, prompt, lora_task_id=lora, cache_salt=salt)


def _image(ctx: Context, position: int, length: int, hashed: bool = True) -> MultimodalItem:
    return MultimodalItem(tuple(ctx.random.getrandbits(31) for _ in range(8)), position, length, hashed)


@scenario
def multimodal(ctx: Context) -> None:
    """Images stand as equal tokens in the prompt; their digests tell them apart, from the block they begin in."""
    engine = ctx.engine()
    prompt = ctx.tokens(10) + [9] * 20 + ctx.tokens(12)
    one, two = _image(ctx, 10, 20), _image(ctx, 10, 20)
    ctx.ask(engine, prompt, multimodal=(one,))
    ctx.warm(engine, prompt, multimodal=(one,))
    ctx.flush(engine)
    status = ctx.ask(engine, prompt, multimodal=(two,))
    ctx.expect(status.offered <= 8, f"{status.offered} tokens of another image's prompt were offered")
    ctx.warm(engine, prompt, multimodal=(two,))
    ctx.flush(engine)
    half = (_image(ctx, 10, 10), _image(ctx, 20, 10))
    ctx.ask(engine, prompt, multimodal=half)
    ctx.warm(engine, prompt, multimodal=half)
    ctx.flush(engine)
    ctx.ask(engine, prompt, multimodal=(half[0], _image(ctx, 20, 10)))


@scenario
def multimodal_unhashed(ctx: Context) -> None:
    """Images without digests: no key is right, so nothing is offered and nothing is kept."""
    engine = ctx.engine()
    prompt = ctx.tokens(10) + [9] * 20 + ctx.tokens(12)
    for _ in range(2):
        ctx.flush(engine)
        status = ctx.ask(engine, prompt, multimodal=(_image(ctx, 10, 20, hashed=False),))
        ctx.expect(status.offered == 0, f"{status.offered} tokens were offered for an image without a digest")
    plain = ctx.ask(engine, prompt)
    ctx.expect(plain.offered <= 8, "blocks of an image without a digest were kept")


@scenario
def block_size_mismatch(ctx: Context) -> None:
    """The engine's blocks are not what the arguments say: refuse to start, or stay away."""
    engine = ctx.try_engine(tokens_per_block_told=16)
    if engine is None:
        return
    prompt = ctx.tokens(70)
    for _ in range(3):
        ctx.flush(engine)
        status = ctx.ask(engine, prompt)
        ctx.expect(status.offered == 0, "tokens were offered although the block size is not known")
