"""KernelSpec: everything that changes machine code, and nothing else. Equal specs give equal source and one cubin."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from ..types import DType, SmArch

__all__ = ["WARPGROUP_ROWS", "Direction", "Family", "KernelSpec", "Tile", "fits_warpgroup"]

WARPGROUP_ROWS = 64  # of Q, in a buffer of its own, in the FA3 family
_FA3_BARRIERS = 512  # bytes; the kernel asserts that its barriers fit
_FA3_ALIGNMENT = 1024  # the swizzle repeats over 1024 bytes, dynamic shared memory starts on 16


def fits_warpgroup(ratio: int) -> bool:
    """Whether the rows of a warpgroup are those of ``ratio`` query heads that share K and V, for a number of queries."""
    return ratio > 1 and WARPGROUP_ROWS % ratio == 0


class Family(Enum):
    """Which instructions do the products: ``FA2`` mma.sync, ``FA3`` wgmma."""

    FA2 = "fa2"
    FA3 = "fa3"


class Direction(Enum):
    """What the kernel computes."""

    FORWARD = "fwd"
    DROPOUT_MASK = "dropout_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How work is cut: rows of Q and of K/V per step, warps a block, K/V buffers, blocks an SM shall hold."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    min_blocks: int = 1
    ping_pong: bool = False  # FA3: warpgroups issue their products in turn
    persistent: bool = False  # blocks take tile after tile

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.warps * 32

    def __str__(self) -> str:
        letters = "i" * self.ping_pong + "p" * self.persistent
        return f"m{self.block_m}n{self.block_n}w{self.warps}s{self.stages}{letters}b{self.min_blocks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One compiled kernel. ``head_dim`` and ``v_head_dim`` are tile widths (32, 64, 96, 128, 192, 256), not the user's sizes."""

    family: Family
    direction: Direction
    arch: SmArch
    dtype: DType
    head_dim: int
    v_head_dim: int
    tile: Tile
    exact_head_dim: bool = True  # the user's sizes equal the widths: no column test on load
    aligned: bool = True  # every pointer and stride is a multiple of 16 bytes
    left_bound: bool = False
    right_bound: bool = False
    sink_tokens: bool = False
    alibi: bool = False
    softcap: bool = False
    prescale: bool = False  # scale before the maximum: needed when softmax_scale <= 0
    learned_sink: bool = False
    dropout: bool = False
    varlen: bool = False
    pack_gqa: bool = False  # FA3: the rows of Q are those of all heads that share K and V

    @property
    def kernel_name(self) -> str:
        """Canonical name: the entry point of the cubin, a benchmark row, a test id."""
        head = str(self.head_dim) if self.head_dim == self.v_head_dim else f"{self.head_dim}v{self.v_head_dim}"
        parts = [self.family.value, self.direction.value, self.arch.value.replace("_", ""), self.dtype.value, f"d{head}", str(self.tile)]
        parts += [f.name.replace("_", "") for f in fields(self) if f.type == "bool" and f.default is False and getattr(self, f.name)]
        parts += [name for name, on in (("padded", not self.exact_head_dim), ("unaligned", not self.aligned)) if on]
        return "_".join(parts)

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory: Q, then ``stages`` buffers of K and of V; FA3 adds its barriers."""
        if self.direction is Direction.DROPOUT_MASK:
            return 0
        tile, size = self.tile, self.dtype.itemsize
        q = tile.block_m * self.head_dim * size
        kv = tile.stages * tile.block_n * (self.head_dim + self.v_head_dim) * size
        if self.family is Family.FA3:
            return q + kv + _FA3_BARRIERS + _FA3_ALIGNMENT
        return q + kv

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """SASS opcodes that must appear; CI disassembles and looks for them."""
        if self.direction is Direction.DROPOUT_MASK:
            return ("IMAD.WIDE.U32",)
        if self.family is Family.FA3:
            return ("HGMMA", "UTMALDG", "SYNCS")
        return ("HMMA", "LDSM", "LDGSTS") if self.aligned else ("HMMA", "LDSM")
