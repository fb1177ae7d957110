"""Sizes of a fake model's KV memory."""

from __future__ import annotations

from dataclasses import dataclass

from .content import LayerShape


@dataclass(frozen=True)
class GroupGeometry:
    """Layers that share page numbers; `regions` slices of memory, each with `padding` bytes behind every slot."""

    layers: tuple[int, ...]
    window: int | None = None
    heads: int = 2
    head_bytes: int = 16
    regions: int = 1
    padding: int = 0

    def layers_of_region(self, region: int) -> tuple[int, ...]:
        return self.layers[region :: self.regions]


@dataclass(frozen=True)
class Geometry:
    pages: int
    tokens_per_block: int
    kv_factor: int
    groups: tuple[GroupGeometry, ...]
    flat: bool

    @property
    def layer_count(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    def shape(self, group: GroupGeometry, layer: int, rank: int) -> LayerShape:
        return LayerShape(layer, self.kv_factor, group.heads, group.head_bytes, rank)


def flat(pages: int, tokens_per_block: int, layers: int = 2, kv_factor: int = 2) -> Geometry:
    """L1: one pool, one group, one contiguous range per block."""
    return Geometry(pages, tokens_per_block, kv_factor, (GroupGeometry(tuple(range(layers))),), flat=True)


def layered(pages: int, tokens_per_block: int, window: int | None, kv_factor: int = 2) -> Geometry:
    """L2: with a window two groups of different page sizes, regions and padding, else one group of two regions."""
    if window is None:
        return Geometry(
            pages, tokens_per_block, kv_factor, (GroupGeometry((0, 1, 2), regions=2, padding=64),), flat=False
        )
    full = GroupGeometry((0, 2), regions=1, padding=32)
    sliding = GroupGeometry((1, 3, 4), window=window, heads=1, regions=3)
    return Geometry(pages, tokens_per_block, kv_factor, (full, sliding), flat=False)
