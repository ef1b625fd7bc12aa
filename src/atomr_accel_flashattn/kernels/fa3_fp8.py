"""The forward kernel of the wgmma family over fp8 tensors: ``cuda/kernels/fa3_fp8.cuh`` (arXiv 2407.08608, section 3.3)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..limits import SCALED_TOKENS
from ..problem import ArrayInfo, AttentionProblem
from ..types import DType
from .fa3_fwd import SWIZZLE_BYTES, Fa3ForwardSpec, consumer_holds
from .forward import DESCALE_SLOTS, FwdParams, descale_strides
from .params import KernelParams, StrideParams, TensorMapParams
from .wgmma import Product

__all__ = ["FP8_WIDTHS", "Fa3Fp8ForwardSpec", "Fa3Fp8FwdParams", "Fp8Wgmma", "fp8_width", "has_sum_columns"]

FP8_WIDTHS: Final = (64, 128, 192, 256)  # rows of tiles are whole panels of 64 or 128 bytes
_MOST_COLUMNS: Final = 128  # of O in one product: two of them are faster than one of 256
_MOST_LOADED: Final = 2  # buffers of V before it is transposed
_GROUP: Final = 32  # keys of a step of wgmma
_SUM_COLUMNS: Final = 8
_WARPS_OF_TWO: Final = 12  # a producer warpgroup and two consumers
_BOTH_IN_FLIGHT: Final = 8  # registers beside O, S and P where both products run beside the softmax


def fp8_width(head_dim: int) -> int:
    """The tile width that holds a head dim of 16..256."""
    return next(width for width in FP8_WIDTHS if width >= head_dim)


def has_sum_columns(v_type: DType, *, single_level: bool, block_descales: bool) -> bool:
    """Whether ones behind the columns of V add up P as it was rounded, and O is divided by that: in e5m2.

    Rounding P to three bits moves its sum by up to a ninth, and by 0.8 % with scores of a standard deviation of 2, where 8-bit wgmma
    loses a tenth of that more. There are none with factors of blocks, as O has another unit in each tile then and those sums have not;
    and none in a single level, which is to be fast.
    """
    return v_type is DType.F8E5M2 and not (single_level or block_descales)


class Fa3Fp8FwdParams(KernelParams):
    """``fa::Fa3Fp8FwdParams``. The addresses of its factors run on into those of ``fa::FwdParams``."""

    SLOTS = (*DESCALE_SLOTS, *FwdParams.SLOTS)
    MAPS = (("q_map", "q"), ("k_map", "k"), ("v_map", "v"))
    _fields_ = (
        *((name, ctypes.c_void_p) for name in DESCALE_SLOTS),
        ("fwd", FwdParams),
        *((f"{name}_stride", StrideParams) for name in DESCALE_SLOTS),
        ("counters", ctypes.c_void_p),
        ("tiles", ctypes.c_int32),
        ("_alignment", ctypes.c_ubyte * (-(24 + ctypes.sizeof(FwdParams) + 3 * ctypes.sizeof(StrideParams) + 12) % 64)),
        *((name, TensorMapParams) for name, _ in MAPS),
    )


@dataclass(frozen=True, kw_only=True)
class Fp8Wgmma(Fa3ForwardSpec):
    """What fp8 adds to a kernel of the wgmma family, over plain arrays or over a cache: a base before that of 16 bits.

    Three of the producer's warps transpose V. ``single_level``: wgmma adds P V to O, of which it keeps 14 bits. ``block_descales``: blocks
    of 128 tokens of q, k or v have factors of their own, and a tile of keys lies in one of them.
    """

    __slots__ = ()
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**Fa3ForwardSpec.AXES, "block_n": tuple(range(_GROUP, 257, _GROUP)), "stages": (1, 2, 3, 4)}
    )

    single_level: bool = False
    block_descales: bool = False

    @property
    def sum_columns(self) -> int:
        """How many columns of ones stand behind those of V: none, or the least that wgmma multiplies."""
        sums = has_sum_columns(self.v_type, single_level=self.single_level, block_descales=self.block_descales)
        return _SUM_COLUMNS if sums else 0

    @property
    def pv_columns(self) -> int:
        """Columns of O in one product P V whose accumulators take the registers of S."""
        return self.v_head_dim // -(-self.v_head_dim // _MOST_COLUMNS)

    @property
    def pv_sum(self) -> str:
        """The ``fa::PvSum``: beside O where registers hold both, S and P."""
        if self.single_level:
            return "InO"
        held = self.v_head_dim + self.sum_columns + self._scores_and_p
        return "Beside" if consumer_holds(self.tile, held, transposing=True) else "InScores"

    @property
    def _scores_and_p(self) -> int:
        """Registers of S in float32 and P in 8 bits."""
        return self.tile.block_n // 2 + self.tile.block_n // 8

    @property
    def lean_producer(self) -> bool:
        """Whether two consumers take registers of the producers, whose transposition of V then spills a few: 4 % faster at 256 columns."""
        held = self.v_head_dim // 2 + self._scores_and_p + _BOTH_IN_FLIGHT
        return self.single_level and self.tile.warps == _WARPS_OF_TWO and not consumer_holds(self.tile, held, transposing=True)

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """Wgmma of 8 bits, TMA loads, mbarriers, the transposition of V."""
        return "QGMMA", "UTMALDG", "SYNCS", "LDSM", "STSM"

    def shared_tiles(self) -> tuple[int, int]:
        """With the buffers of V before it is transposed, and the columns of ones of each stage."""
        (q, kv), tile = super().shared_tiles(), self.tile
        loaded = min(tile.stages, _MOST_LOADED) * tile.block_n * self.v_head_dim
        ones = self.sum_columns * tile.block_n * tile.stages
        return q, kv + loaded + -(-ones // SWIZZLE_BYTES) * SWIZZLE_BYTES

    def products(self) -> tuple[Product, ...]:
        """Q K^T, and P V at once or in equal parts, of which the last one has the columns of ones."""
        qk, (width, p_type, v_type) = super().products()
        part = self.pv_columns if self.pv_sum == "InScores" else width
        widths = {part, part + self.sum_columns} if part < width else {part + self.sum_columns}
        return qk, *((n, p_type, v_type) for n in sorted(widths))

    def misfit(self) -> str:
        """As for 16 bits, with whole steps of 32 keys."""
        reason, keys = super().misfit(), self.tile.block_n
        if reason:
            return reason
        if keys % _GROUP:
            return f"block_n: got {keys}; allowed are multiples of {_GROUP}"
        if keys == _GROUP and self.sum_columns:
            return (
                f"block_n: got {keys}; allowed with v of e5m2 are {2 * _GROUP} and more: "
                "ptxas serialises a single step with columns of ones"
            )
        if self.block_descales and self.single_level:
            return "single_level: allowed without factors of blocks, each of which gives O another unit"
        if self.block_descales and SCALED_TOKENS % keys:
            return f"block_n: got {keys}; allowed with factors of blocks are divisors of {SCALED_TOKENS}"
        return ""

    def registers_suffice(self) -> bool:
        """O and S, or a product P V in its registers, and the sums of the columns of ones, in float32, and P in 8 bits.

        Generous, by the 240 registers of 16-bit consumers: a tile that spills a few may still be the fastest.
        """
        columns = self.sum_columns
        wider = 0 if self.single_level else max(0, self.pv_columns + columns - self.tile.block_n)
        held = (self.v_head_dim + wider + columns) // 2 + self._scores_and_p
        return consumer_holds(self.tile, held)

    def config(self) -> dict[str, Any]:
        """With factors of blocks, how P V gets into O, columns of ones, and who has the registers."""
        return super().config() | {
            "block_descales": self.block_descales,
            "pv_sum": f"fa::PvSum::{self.pv_sum}",
            "pv_columns": self.pv_columns,
            "sum_columns": self.sum_columns,
            "lean_producer": self.lean_producer,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3Fp8ForwardSpec(Fp8Wgmma):
    """The mainloop of :class:`Fa3ForwardSpec` with 8-bit wgmma. sm_90a."""

    HEADER: ClassVar[str] = "fa3_fp8"
    ENTRY: ClassVar[str] = "fa3_fp8"
    PARAMS: ClassVar[str] = "Fa3Fp8FwdParams"

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """``fa::Fa3Fp8FwdParams`` with its maps still to be encoded."""
        params = Fa3Fp8FwdParams(fwd=self.pack_forward(problem, out), tiles=self.work_tiles(problem), **descale_strides(problem))
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params
