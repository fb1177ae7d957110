"""Bytes of pages, in whichever form a connector was shown the KV memory."""

from __future__ import annotations

from typing import Any

import numpy as np


class Pages:
    """Reads and writes whole pages of layer groups, on the CPU or on a GPU."""

    def __init__(self, regions_by_group: list[list[Any]]) -> None:
        self._regions = regions_by_group
        first = regions_by_group[0][0]
        self.on_cuda = first.device.type == "cuda"
        if self.on_cuda:
            import torch  # type: ignore[import-not-found,unused-ignore]

            self._torch = torch
            self._stream = torch.cuda.Stream(device=first.device)

    @classmethod
    def of_tensor(cls, tensor: Any) -> Pages:
        return cls([[tensor]])

    @classmethod
    def of_layout(cls, layout: Any) -> Pages:
        return cls([[region.as_tensor() for region in group.regions] for group in layout.groups])

    @property
    def groups(self) -> int:
        return len(self._regions)

    def read(self, group: int, page: int) -> bytes:
        parts = []
        for region in self._regions[group]:
            if self.on_cuda:
                with self._torch.cuda.stream(self._stream):
                    parts.append(region[page].contiguous().view(self._torch.uint8).cpu().numpy().tobytes())
            else:
                parts.append(region.numpy()[page].tobytes())
        return b"".join(parts)

    def write(self, group: int, page: int, data: bytes) -> None:
        offset = 0
        for region in self._regions[group]:
            if self.on_cuda:
                torch = self._torch
                size = region[page].numel() * region.element_size()
                source = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=region.dtype)
                with torch.cuda.stream(self._stream):
                    region[page].copy_(source.view(region[page].shape))
                    self._stream.synchronize()
            else:
                row = region.numpy()[page]
                size = row.nbytes
                row[...] = np.frombuffer(data[offset : offset + size], dtype=row.dtype).reshape(row.shape)
            offset += size

    def wait_for(self, event: Any) -> None:
        """What this reads next is what was there when the event was recorded, or later."""
        if self.on_cuda:
            self._stream.wait_event(event)
