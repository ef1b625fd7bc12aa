"""The forward kernel of the wgmma family: ``cuda/kernels/fa3_fwd.cuh``, FlashAttention-3 (arXiv 2407.08608)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..problem import ArrayInfo, AttentionProblem, Strides
from ..types import DType
from .forward import ForwardSpec, FwdParams
from .params import KernelParams, TensorMapParams, TensorMapSpec
from .spec import Family, Tile
from .wgmma import Product, wgmma_leaves

__all__ = [
    "SWIZZLE_BYTES",
    "WARPGROUP_ROWS",
    "Fa3ForwardSpec",
    "Fa3FwdParams",
    "consumer_holds",
    "fits_warpgroup",
    "tensor_map_of",
    "tensor_map_of_q",
]

WARPGROUP_ROWS: Final = 64  # of Q, in a buffer of its own
_BARRIER_BYTES: Final = 512  # the kernel asserts that its barriers fit
SWIZZLE_BYTES: Final = 1024  # the swizzle repeats over 1024 bytes, dynamic shared memory starts on 16
_WIDE_ROW, _NARROW_ROW = 128, 64  # bytes of a tile's row, and so the swizzle's span
_OTHER_REGISTERS: Final = 24  # beside accumulators and scores
_CONSUMER_REGISTERS: Final = {1: 255, 2: 240, 3: 160, 4: 112}  # per thread, by consumer warpgroups: the header sets the same
_BESIDE_TRANSPOSITION: Final = {2: 232}  # where producers transpose V
_LONGEST_WGMMA: Final = 256
_MOST_STAGES: Final = 11
_NOWHERE: Final = 16  # the address of arrays without elements, which nobody reads: null may not be one


def fits_warpgroup(ratio: int) -> bool:
    """Whether the rows of a warpgroup are those of ``ratio`` query heads that share K and V, for a number of queries."""
    return ratio > 1 and WARPGROUP_ROWS % ratio == 0


class Fa3FwdParams(KernelParams):
    """``fa::Fa3FwdParams``: q, k and v are read through tensor maps."""

    SLOTS = FwdParams.SLOTS
    MAPS = (("q_map", "q"), ("k_map", "k"), ("v_map", "v"))
    _fields_ = (
        ("fwd", FwdParams),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_int32),
        ("_alignment", ctypes.c_ubyte * (-(ctypes.sizeof(FwdParams) + 12) % 64)),  # the maps begin at a multiple of 64
        *((name, TensorMapParams) for name, _ in MAPS),
    )


def consumer_holds(tile: Tile, held: int, *, transposing: bool = False) -> bool:
    """Whether a consumer thread of this tile has so many registers beside what each needs; ``transposing``: producers transpose V."""
    registers = _CONSUMER_REGISTERS | (_BESIDE_TRANSPOSITION if transposing else {})
    return held + _OTHER_REGISTERS <= registers[tile.warps // 4 - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3ForwardSpec(ForwardSpec):
    """Three producer warps bring Q, K and V by TMA, one to four consumer warpgroups multiply with wgmma. sm_90a."""

    HEADER: ClassVar[str] = "fa3_fwd"
    ENTRY: ClassVar[str] = "fa3_forward"
    PARAMS: ClassVar[str] = "Fa3FwdParams"
    FAMILY: ClassVar[Family] = Family.FA3
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            "block_m": (64, 128, 192, 256),
            "block_n": tuple(range(16, 257, 16)),
            "warps": (8, 12, 16, 20),
            "stages": (2, 3, 4),
            "ping_pong": (False, True),
            "persistent": (True, False),  # persistent first: with few tiles both are one kernel, a block for each tile
        }
    )

    @property
    def shared_memory(self) -> int:
        """Q, the stages of K and V, and the barriers."""
        return sum(self.shared_tiles()) + _BARRIER_BYTES + SWIZZLE_BYTES

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """wgmma, TMA loads, mbarriers."""
        return ("HGMMA", "UTMALDG", "SYNCS")

    def misfit(self) -> str:
        """One producer warpgroup, one to four consumers of 64 rows each."""
        tile = self.tile
        groups = tile.warps // 4 - 1
        if tile.warps % 4 or groups not in _CONSUMER_REGISTERS:
            return f"warps: got {tile.warps}; allowed are 8, 12, 16 and 20: a producer warpgroup, and one to four consumers"
        if tile.block_m != groups * WARPGROUP_ROWS:
            return f"block_m: got {tile.block_m}; allowed with {tile.warps} warps is {groups * WARPGROUP_ROWS}"
        if tile.block_n > _LONGEST_WGMMA:
            return f"block_n: got {tile.block_n}; allowed is at most {_LONGEST_WGMMA}"
        if tile.stages > _MOST_STAGES:
            return f"stages: got {tile.stages}; allowed are at most {_MOST_STAGES}, whose barriers have room"
        if tile.ping_pong and groups == 1:
            return "ping_pong: allowed with two to four consumer warpgroups"
        return ""

    def registers_suffice(self) -> bool:
        """O and S in float32, and P in 16 bits, of a consumer's registers."""
        return consumer_holds(self.tile, self.v_head_dim // 2 + self.tile.block_n // 2 + self.tile.block_n // 4)

    def leaves(self) -> str:
        """Wgmma for the N of both products: an instruction names each of its accumulators."""
        return '#include "ptx/wgmma.cuh"\n\n' + wgmma_leaves(self.products()) + "\n"

    def products(self) -> tuple[Product, ...]:
        """Those of Q K^T and P V."""
        return (self.tile.block_n, self.dtype, self.k_type), (self.v_head_dim, self.v_type, self.v_type)

    @property
    def launch_bounds(self) -> str:
        """Threads a block, and the blocks that an SM holds."""
        return f"{self.threads}, 1"

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:
        """A block for each tile; persistent blocks as many as asked for, or one for each SM."""
        return min(tiles, blocks or multiprocessors) if self.tile.persistent else tiles

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """``fa::Fa3FwdParams`` with its maps still to be encoded."""
        params = Fa3FwdParams(fwd=self.pack_forward(problem, out), tiles=self.work_tiles(problem))
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params

    def tensor_maps(self, problem: AttentionProblem) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
        """The maps of q, k and v: boxes are the swizzled tiles of ``cuda/tile``."""
        return (
            tensor_map_of_q(problem, self.head_dim, packed=self.pack_gqa),
            _map(problem.k, problem.k_strides, problem.batch, self.head_dim, self.tile.block_n),
            _map(problem.v, problem.v_strides, problem.batch, self.v_head_dim, self.tile.block_n),
        )


def tensor_map_of_q(problem: AttentionProblem, width: int, *, packed: bool) -> TensorMapSpec:
    """The map of q, in boxes of the rows of a warpgroup; ``packed``: those of all heads that share K and V."""
    q = _map(problem.q, problem.q_strides, problem.batch, width, WARPGROUP_ROWS)
    return _packed(q, problem.heads // problem.heads_kv) if packed else q


def _map(array: ArrayInfo, strides: Strides, batch: int, width: int, rows: int) -> TensorMapSpec:
    """Packed arrays are one batch of all tokens."""
    *lead, tokens, heads, columns = array.shape
    return tensor_map_of(array, strides if lead else strides._replace(batch=0), (columns, tokens, heads, batch if lead else 1), width, rows)


def tensor_map_of(array: ArrayInfo, strides: Strides, sizes: tuple[int, int, int, int], width: int, rows: int) -> TensorMapSpec:
    """A map of (columns, rows, heads, batches), in boxes of ``rows`` rows. A size of 0 is not allowed, and is never read: it becomes 1."""
    dtype = array.dtype or DType.F16
    columns, tokens, heads, batches = sizes
    sizes = (columns, max(1, tokens), max(1, heads), max(1, batches))
    steps = (strides.row, strides.head, strides.batch)
    row_bytes = _NARROW_ROW if width * dtype.itemsize % _WIDE_ROW else _WIDE_ROW
    box = (row_bytes // dtype.itemsize, rows, 1, 1)
    return TensorMapSpec(dtype, array.ptr or _NOWHERE, sizes, _bytes(steps, sizes, dtype), box)


def _packed(q: TensorMapSpec, group: int) -> TensorMapSpec:
    """The map of q with ``group`` heads after the columns, so that a box holds all of them for one row after the other."""
    (columns, rows, heads, batches), (row, head, batch), (width, box_rows, *_) = q.sizes, q.strides, q.box
    return replace(
        q,
        sizes=(columns, group, rows, heads // group, batches),
        strides=(head, row, head * group, batch),
        box=(width, group, box_rows // group, 1, 1),
    )


def _bytes(steps: tuple[int, int, int], sizes: tuple[int, int, int, int], dtype: DType) -> tuple[int, int, int]:
    """A dimension of one element is never stepped over, whatever its stride says: 16 is as good as any."""
    row, head, batch = (16 if size == 1 else step * dtype.itemsize for step, size in zip(steps, sizes[1:], strict=True))
    return row, head, batch
