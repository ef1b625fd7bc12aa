"""Element types and GPU architectures: the vocabulary that every other module shares."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["DType", "Device", "KvLayout", "ScaleUnit", "SmArch"]


class DType(Enum):
    """Element type of q, k and v. The value is the short name used in kernel names and keys."""

    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "e4m3"
    F8E5M2 = "e5m2"
    F32 = "f32"
    F64 = "f64"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]

    @property
    def is_fp8(self) -> bool:
        """Whether this is one of the two 8-bit formats."""
        return self.itemsize == 1


_ITEMSIZE = {DType.F16: 2, DType.BF16: 2, DType.F8E4M3: 1, DType.F8E5M2: 1, DType.F32: 4, DType.F64: 8}


class SmArch(Enum):
    """Compile target. ``SM_90`` means the mma.sync family on Hopper, ``SM_90A`` the wgmma family; ``CPU`` the reference backend."""

    CPU = "cpu"
    SM_80 = "sm_80"
    SM_86 = "sm_86"
    SM_89 = "sm_89"
    SM_90 = "sm_90"
    SM_90A = "sm_90a"
    SM_100 = "sm_100"
    SM_120 = "sm_120"

    @property
    def without_wgmma(self) -> SmArch:
        """What kernels without wgmma are compiled for: sm_90 on Hopper."""
        return SmArch.SM_90 if self is SmArch.SM_90A else self

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes of dynamic shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities)."""
        return _SHARED_PER_BLOCK[self]

    @property
    def shared_memory_per_sm(self) -> int:
        """Bytes of shared memory of one SM."""
        return self.shared_memory_per_block + 1024 if self is not SmArch.CPU else 0


_SHARED_PER_BLOCK = {
    SmArch.CPU: 0,
    SmArch.SM_80: 163 * 1024,
    SmArch.SM_86: 99 * 1024,
    SmArch.SM_89: 99 * 1024,
    SmArch.SM_90: 227 * 1024,
    SmArch.SM_90A: 227 * 1024,
    SmArch.SM_100: 227 * 1024,
    SmArch.SM_120: 99 * 1024,
}


class KvLayout(Enum):
    """Order of the dimensions of K and V in a cache. The value is the name in dispatch keys."""

    NHD = "NHD"  # (blocks, slots, KV heads, head dim)
    HND = "HND"  # (blocks, KV heads, slots, head dim)


class ScaleUnit(Enum):
    """What elements of q, k or v share one descale. The value is the name in dispatch keys."""

    TENSOR = "tensor"  # (): all
    HEAD = "head"  # (batch, KV heads): those of a sequence and KV head
    BLOCK = "block"  # (batch, KV heads, blocks): 128 tokens of these, counted inside each sequence
    TOKEN = "token"  # noqa: S105 - (cache blocks, block size, KV heads): a slot of a paged cache and KV head


class Device(NamedTuple):
    """Where an array lives: ``("cpu", 0)`` or ``("cuda", ordinal)``."""

    kind: str
    index: int  # type: ignore[assignment]  # the field hides tuple.index, which nobody calls here

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"
