"""Looks to a connector like the torch tensors and streams that TensorRT-LLM shows, over memory of the CPU."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


class SharedMemory:
    """A memfd, mapped shared: another process that is given the descriptor can copy from it and into it."""

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)


@dataclass(frozen=True)
class Dtype:
    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"

    __repr__ = __str__


@dataclass(frozen=True)
class Device:
    type: str = "cpu"
    index: int | None = None

    def __str__(self) -> str:
        return self.type


FLOAT16 = Dtype("float16", 2)
UINT8 = Dtype("uint8", 1)


class CpuTensor:
    """The attributes of a torch.Tensor that a connector may use. `memfd` is (descriptor, offset of the first byte)."""

    def __init__(self, array: npt.NDArray[Any], dtype: Dtype, memfd: tuple[int, int]) -> None:
        self._array = array
        self.dtype = dtype
        self.device = Device()
        self.shape = tuple(array.shape)
        self.memfd = memfd
        self.is_cuda = False

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def numel(self) -> int:
        return int(self._array.size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        strides = tuple(stride // self.dtype.itemsize for stride in self._array.strides)
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        return bool(self._array.flags.c_contiguous)

    @property
    def nbytes(self) -> int:
        return int(self._array.nbytes)

    def numpy(self) -> npt.NDArray[Any]:
        return self._array


class CpuEvent:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def wait(self, stream: Any = None) -> None:
        return None


class CpuStream:
    """Compute on the CPU is over when its call returns, so a stream has nothing to wait for."""

    cuda_stream = 0
    device = Device()

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def wait_stream(self, other: Any) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        return None

    def record_event(self, event: Any = None) -> Any:
        return event or CpuEvent()
