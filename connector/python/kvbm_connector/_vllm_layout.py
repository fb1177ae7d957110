"""Where the bytes of a block are in the engine's tensors.

A tensor has one dimension that counts blocks; all others are bytes of a block. Whatever their order and strides are,
they are pieces of memory that repeat from block to block: neighbours become one piece, so that tensors in which a block
lies in one place, over all layers, give one piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

# (address of block 0, bytes of a block, bytes from one block to the next, blocks)
Region = tuple[int, int, int, int]

# Kernels may use smaller blocks than the scheduler, so many of them.
_STEPS = (1, 2, 4, 8, 16, 32, 64)


def block_dimension(shape: Iterable[int], blocks: int) -> tuple[int, int]:
    """Which dimension counts blocks, and how many of its steps are one block."""
    shape = tuple(shape)
    found = [(at, size // blocks) for at, size in enumerate(shape) if size % blocks == 0 and size // blocks in _STEPS]
    if len(found) != 1:
        what = "no dimension" if not found else "several dimensions"
        raise NotImplementedError(
            f"kvbm_connector: a KV tensor of shape {shape} has {what} of {blocks} blocks; set num_gpu_blocks_override "
            "to another number"
        )
    return found[0]


def regions_of(tensor: Any, blocks: int) -> list[Region]:
    """Pieces of one tensor, in the order of their first addresses."""
    shape, strides, size = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.element_size())
    dimension, steps = block_dimension(shape, blocks)
    step = strides[dimension]
    inner = [(strides[at], shape[at]) for at in range(len(shape)) if at != dimension and shape[at] > 1]
    if steps > 1:
        inner.append((step, steps))
    run = 1
    apart: list[tuple[int, int]] = []
    for each, count in sorted(inner):
        if each == run and not apart:
            run *= count
        else:
            apart.append((each, count))
    offsets = [sum(offset) for offset in product(*([each * at for at in range(count)] for each, count in apart))]
    base, stride = int(tensor.data_ptr()), step * steps * size
    return sorted((base + offset * size, run * size, stride, blocks) for offset in offsets)


def merged(regions: Iterable[Region]) -> list[Region]:
    """Neighbours that repeat alike become one; what is named twice, as layers that share memory are, counts once."""
    whole: list[Region] = []
    for region in dict.fromkeys(regions):
        base, size, stride, blocks = region
        if whole and (whole[-1][2], whole[-1][3]) == (stride, blocks) and whole[-1][0] + whole[-1][1] == base:
            before = whole.pop()
            region = (before[0], before[1] + size, stride, blocks)
        whole.append(region)
    return whole


def describe(tensor: Any, blocks: int) -> str:
    """The order of a block's bytes: sizes of its dimensions, outermost first, by their place in the tensor's shape."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    dimension, steps = block_dimension(shape, blocks)
    inner = sorted((-strides[at], at) for at in range(len(shape)) if at != dimension)
    sizes = " ".join(f"{at}:{shape[at]}" for _, at in inner)
    return f"{str(tensor.dtype).removeprefix('torch.')} /{dimension}*{steps} {sizes}"


def layers_of(tensors: dict[str, Any], blocks: int, names: list[str]) -> dict[str, int]:
    """The place of each layer in a block, if all have as many bytes of it, one behind the other; nothing if not.

    `names`: of the layers of a tensor that has them all.
    """
    if len(tensors) == 1:
        (tensor,) = tensors.values()
        regions = regions_of(tensor, blocks)
        dimension, _ = block_dimension(tensor.shape, blocks)
        bytes_of_layer = regions[0][1] // max(len(names), 1)
        # Another dimension of that size, such as that of heads, might be the one that lies outermost.
        of_that_size = [
            stride * int(tensor.element_size())
            for at, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
            if at != dimension and size == len(names)
        ]
        is_outermost = of_that_size == [bytes_of_layer]
        return {name: at for at, name in enumerate(names)} if len(regions) == 1 and is_outermost else {}
    each = [regions_of(tensor, blocks) for tensor in tensors.values()]
    pieces = [region for regions in each for region in regions]
    alike = len({sum(region[1] for region in regions) for regions in each}) == 1
    return {name: at for at, name in enumerate(tensors)} if alike and len(set(pieces)) == len(pieces) else {}


def layout_of(tensors: dict[str, Any], blocks: int) -> tuple[list[Region], str]:
    """Pieces of a block over all tensors, and a name of the order of its bytes."""
    regions = merged(region for tensor in tensors.values() for region in regions_of(tensor, blocks))
    kinds: list[list[Any]] = []
    for tensor in tensors.values():
        kind = describe(tensor, blocks)
        if kinds and kinds[-1][0] == kind:
            kinds[-1][1] += 1
        else:
            kinds.append([kind, 1])
    described = "; ".join(f"{count} x [{kind}]" for kind, count in kinds)
    sizes = " ".join(str(size) for _, size, _, _ in regions) if len(regions) < 4 else f"{len(regions)} pieces"
    return regions, f"vllm {described} as {sizes}"
