"""The KV memory of one rank, and the compute on it: write what a position's bytes must be, read and compare.

One implementation serves numpy on the CPU and torch on CUDA: indexing is the same in both, and only making arrays and
carrying bytes to the device differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import contract
from .content import POISON, LayerShape, Words, expand
from .cpu_tensor import FLOAT16, UINT8, CpuStream, CpuTensor, SharedMemory
from .geometry import Geometry

PAGE = 4096


@dataclass
class _Region:
    """Slots of one region: `slots` is [pages, stride] bytes."""

    layers: tuple[int, ...]
    slots: Any
    size: int
    offset: int


Check = Callable[[], str | None]
"""Says what was wrong, or nothing, once the device has come to it."""


class KvMemory:
    def __init__(self, geometry: Geometry, rank: int, device: str) -> None:
        self.geometry = geometry
        self.rank = rank
        self.device = device
        self.on_cuda = device.startswith("cuda")
        self._views: list[dict[int, Any]] = []
        self._shapes: list[dict[int, LayerShape]] = []
        self.regions: list[list[_Region]] = []
        self._allocate()

    def _allocate(self) -> None:
        geometry = self.geometry
        tokens = geometry.tokens_per_block
        sizes = []
        for group in geometry.groups:
            for index in range(group.regions):
                layers = group.layers_of_region(index)
                size = sum(geometry.shape(group, layer, self.rank).bytes_per_block(tokens) for layer in layers)
                sizes.append((size, size + group.padding))
        total = sum(-(-geometry.pages * stride // PAGE) * PAGE for _, stride in sizes)
        flat = self._bytes(total)
        offset, next_size = 0, iter(sizes)
        for group in geometry.groups:
            regions, views, shapes = [], {}, {}
            for index in range(group.regions):
                size, stride = next(next_size)
                layers = group.layers_of_region(index)
                slots = flat[offset : offset + geometry.pages * stride].reshape(geometry.pages, stride)
                regions.append(_Region(layers, slots, size, offset))
                inner = 0
                for layer in layers:
                    shape = geometry.shape(group, layer, self.rank)
                    width = shape.bytes_per_block(tokens)
                    part = slots[:, inner : inner + width]
                    dims = (geometry.pages, shape.kv_factor, shape.heads, tokens, shape.head_bytes)
                    views[layer] = self._split(part, stride, dims)
                    shapes[layer] = shape
                    inner += width
                offset += -(-geometry.pages * stride // PAGE) * PAGE
            self.regions.append(regions)
            self._views.append(views)
            self._shapes.append(shapes)

    def _bytes(self, size: int) -> Any:
        if not self.on_cuda:
            self._shared = SharedMemory("fake-engine-kv", size)
            self._shared.bytes[:] = POISON
            return self._shared.bytes
        import torch  # type: ignore[import-not-found,unused-ignore]

        self._torch = torch
        torch.cuda.set_device(self.device)
        return torch.full((size,), POISON, dtype=torch.uint8, device=self.device)

    def _split(self, part: Any, stride: int, dims: tuple[int, ...]) -> Any:
        """[pages, bytes of a layer] seen as [pages, kv_factor, heads, tokens, head_bytes], without a copy."""
        _, kv, heads, tokens, width = dims
        strides = (stride, heads * tokens * width, tokens * width, width, 1)
        if not self.on_cuda:
            return np.lib.stride_tricks.as_strided(part, dims, strides)
        return self._torch.as_strided(part, dims, strides)

    def streams(self) -> tuple[Any, Any]:
        """(current stream, execution stream)."""
        if not self.on_cuda:
            return CpuStream(), CpuStream()
        return self._torch.cuda.current_stream(), self._torch.cuda.Stream()

    def synchronize(self) -> None:
        if self.on_cuda:
            self._torch.cuda.synchronize()

    def _to_device(self, array: Any) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self.device) if self.on_cuda else array

    def _index(self, pages: list[int], start: int, end: int) -> tuple[Any, Any]:
        """(page, place in the page) of each position of [start, end)."""
        positions = np.arange(start, end)
        tokens = self.geometry.tokens_per_block
        return self._to_device(np.asarray(pages)[positions // tokens]), self._to_device(positions % tokens)

    def write(self, group: int, layer: int, pages: list[int], start: int, numbers: Words) -> None:
        """Writes the KV of positions [start, start + len(numbers))."""
        page, place = self._index(pages, start, start + len(numbers))
        data = expand(numbers, self._shapes[group][layer])
        self._views[group][layer][page, :, :, place, :] = self._to_device(data)

    def read(self, group: int, layer: int, pages: list[int], start: int, numbers: Words) -> Check | None:
        """Compares the KV of positions [start, start + len(numbers)) with what it must be."""
        if len(numbers) == 0:
            return None
        page, place = self._index(pages, start, start + len(numbers))
        want = self._to_device(expand(numbers, self._shapes[group][layer]))
        wrong = (self._views[group][layer][page, :, :, place, :] != want).reshape(len(numbers), -1).any(-1)

        def outcome() -> str | None:
            at = wrong.nonzero()
            found = (at[:, 0].cpu().numpy() if self.on_cuda else at[0])
            if len(found) == 0:
                return None
            first = start + int(found[0])
            in_page = pages[first // self.geometry.tokens_per_block]
            return (
                f"{len(found)} of {len(numbers)} positions wrong in layer {layer}, first position {first},"
                f" page {in_page} of group {group}{self._what_is_there(group, layer, in_page, first)}"
            )

        return outcome if self.on_cuda or bool(wrong.any()) else None

    def _what_is_there(self, group: int, layer: int, page: int, position: int) -> str:
        there = self._views[group][layer][page, :, :, position % self.geometry.tokens_per_block, :]
        return " (never written)" if bool((there == POISON).all()) else " (foreign bytes)"

    def poison(self, group: int, pages: list[int]) -> None:
        """Overwrites pages with bytes that are nobody's."""
        if pages:
            for region in self.regions[group]:
                region.slots[pages] = POISON

    def copy(self, group: int, source: int, target: int) -> None:
        for region in self.regions[group]:
            region.slots[target] = region.slots[source]

    def checksum(self, group: int, page: int) -> int:
        crc = 0
        for region in self.regions[group]:
            row = region.slots[page]
            crc = zlib.crc32((row.cpu().numpy() if self.on_cuda else row).tobytes(), crc)
        return crc

    def tensor(self) -> Any:
        """L1: [blocks, layers, kv_factor, elements of a block's layer] of two bytes each."""
        group = self.geometry.groups[0]
        region = self.regions[0][0]
        shape = (self.geometry.pages, len(group.layers), self.geometry.kv_factor, -1)
        if self.on_cuda:
            return region.slots.view(self._torch.float16).view(shape)
        return CpuTensor(region.slots.view(np.float16).reshape(shape), FLOAT16, (self._shared.fd, region.offset))

    def layout(self) -> contract.KvCacheLayout:
        """L2: all groups with their regions."""
        groups = []
        for number, group in enumerate(self.geometry.groups):
            regions = [self._layout_region(region) for region in self.regions[number]]
            groups.append(contract.KvCacheLayerGroupLayout(number, list(group.layers), group.window, regions))
        only = len(groups) == 1 and len(self.regions[0]) == 1 and self.geometry.groups[0].padding == 0
        return contract.KvCacheLayout(self.geometry.tokens_per_block, groups, self.tensor if only else None)

    def _layout_region(self, region: _Region) -> contract.KvCacheRegion:
        roles = ["key", "value"][: self.geometry.kv_factor]
        buffers = [contract.KvCacheBufferRef(layer, role) for layer in region.layers for role in roles]
        slots = region.slots
        base = slots.data_ptr() if self.on_cuda else int(slots.ctypes.data)
        memfd = None if self.on_cuda else (self._shared.fd, region.offset)

        def as_tensor() -> Any:
            part = slots[:, : region.size]
            return part if self.on_cuda else CpuTensor(part, UINT8, (self._shared.fd, region.offset))

        return contract.KvCacheRegion(
            base, region.size, int(slots.shape[1]), self.geometry.pages, buffers, as_tensor, memfd
        )
