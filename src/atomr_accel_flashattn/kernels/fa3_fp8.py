"""The forward kernel of the wgmma family over fp8 tensors: ``cuda/kernels/fa3_fp8.cuh`` (arXiv 2407.08608, section 3.3)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

from ..limits import SCALED_TOKENS
from ..problem import ArrayInfo, AttentionProblem
from ..types import DType
from .fa3_fwd import SWIZZLE_BYTES, Fa3ForwardSpec, consumer_holds
from .forward import DESCALE_SLOTS, FwdParams, descale_strides
from .params import KernelParams, StrideParams, TensorMapParams
from .spec import Tile
from .wgmma import Product

__all__ = [
    "FP8_INSTRUCTIONS",
    "FP8_WIDTHS",
    "Fa3Fp8ForwardSpec",
    "Fa3Fp8FwdParams",
    "Fp8Wgmma",
    "added_bytes",
    "fp8_config",
    "fp8_products",
    "fp8_registers",
    "fp8_width",
    "has_sum_columns",
    "misfit_of_keys",
]

FP8_WIDTHS: Final = (64, 128, 192, 256)  # rows of tiles are whole panels of 64 or 128 bytes
_MOST_COLUMNS: Final = 128  # of O in one product: two of them are faster than one of 256
_MOST_LOADED: Final = 2  # buffers of V before it is transposed
_GROUP: Final = 32  # keys of a step of wgmma
_SUM_COLUMNS: Final = 8
FP8_INSTRUCTIONS: Final = ("QGMMA", "UTMALDG", "SYNCS", "LDSM", "STSM")


def fp8_width(head_dim: int) -> int:
    """The tile width that holds a head dim of 16..256."""
    return next(width for width in FP8_WIDTHS if width >= head_dim)


class Fp8Wgmma(Protocol):
    """What kernels of fp8 in this family have in common: over plain arrays, and over a cache."""

    @property
    def tile(self) -> Tile:
        """Block sizes."""

    @property
    def v_head_dim(self) -> int:
        """Width of V."""

    @property
    def v_type(self) -> DType:
        """That of V, and of P."""

    @property
    def single_level(self) -> bool:
        """Whether wgmma adds P V to O."""

    @property
    def block_descales(self) -> bool:
        """Whether factors are those of blocks of tokens."""


def has_sum_columns(v_type: DType, *, single_level: bool, block_descales: bool) -> bool:
    """Whether ones behind the columns of V add up P as it was rounded, and O is divided by that: in e5m2.

    Rounding P to three bits moves its sum by up to a ninth, and by 0.8 % with scores of a standard deviation of 2, where 8-bit wgmma
    loses a tenth of that more. There are none with factors of blocks, as O has another unit in each tile then and those sums have not;
    and none in a single level, which is to be fast.
    """
    return v_type is DType.F8E5M2 and not (single_level or block_descales)


def sum_columns(spec: Fp8Wgmma) -> int:
    """How many columns of ones there are: none, or the least that wgmma multiplies."""
    sums = has_sum_columns(spec.v_type, single_level=spec.single_level, block_descales=spec.block_descales)
    return _SUM_COLUMNS if sums else 0


def added_bytes(spec: Fp8Wgmma) -> int:
    """Of shared memory: the buffers of V before it is transposed, and the columns of ones of each stage."""
    tile = spec.tile
    ones = sum_columns(spec) * tile.block_n * tile.stages
    return min(tile.stages, _MOST_LOADED) * tile.block_n * spec.v_head_dim + -(-ones // SWIZZLE_BYTES) * SWIZZLE_BYTES


def pv_columns(v_head_dim: int) -> int:
    """Columns of O in one product P V whose accumulators take the registers of S."""
    return v_head_dim // -(-v_head_dim // _MOST_COLUMNS)


def pv_sum(spec: Fp8Wgmma) -> str:
    """The ``fa::PvSum``: beside O where registers hold both, S and P."""
    if spec.single_level:
        return "InO"
    keys = spec.tile.block_n
    held = spec.v_head_dim + sum_columns(spec) + keys // 2 + keys // 8
    return "Beside" if consumer_holds(spec.tile, held, transposing=True) else "InScores"


def fp8_products(spec: Fp8Wgmma, products: tuple[Product, ...]) -> tuple[Product, ...]:
    """Q K^T, and P V at once or in equal parts, of which the last one has the columns of ones."""
    qk, (width, p_type, v_type) = products
    part = pv_columns(width) if pv_sum(spec) == "InScores" else width
    widths = {part, part + sum_columns(spec)} if part < width else {part + sum_columns(spec)}
    return qk, *((n, p_type, v_type) for n in sorted(widths))


def misfit_of_keys(spec: Fp8Wgmma) -> str:
    """Why there can be no kernel with these keys of a tile; empty when there can."""
    keys = spec.tile.block_n
    if keys % _GROUP:
        return f"block_n: got {keys}; allowed are multiples of {_GROUP}"
    if keys == _GROUP and sum_columns(spec):
        return f"block_n: got {keys}; allowed with v of e5m2 are {2 * _GROUP} and more: ptxas serialises a single step with columns of ones"
    if spec.block_descales and SCALED_TOKENS % keys:
        return f"block_n: got {keys}; allowed with factors of blocks are divisors of {SCALED_TOKENS}"
    return ""


def fp8_registers(spec: Fp8Wgmma) -> int:
    """Of a consumer thread beside O and S: P, the sums of the columns of ones, and what a product P V has more than S."""
    columns, keys = sum_columns(spec), spec.tile.block_n
    wider = 0 if spec.single_level else max(0, pv_columns(spec.v_head_dim) + columns - keys)
    return (wider + columns) // 2 + keys // 8


def fp8_config(spec: Fp8Wgmma) -> dict[str, Any]:
    """Members of ``fa::Config`` that fp8 adds: factors of blocks, how P V gets into O, columns of ones."""
    return {
        "block_descales": spec.block_descales,
        "pv_sum": f"fa::PvSum::{pv_sum(spec)}",
        "pv_columns": pv_columns(spec.v_head_dim),
        "sum_columns": sum_columns(spec),
    }


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fa3Fp8ForwardSpec(Fa3ForwardSpec):
    """The mainloop of :class:`Fa3ForwardSpec` with 8-bit wgmma; three of the producer's warps transpose V. sm_90a.

    ``single_level``: wgmma adds P V to O, of which it keeps 14 bits. ``block_descales``: blocks of 128 tokens of q, k or v
    have factors of their own, and a tile of keys lies in one of them.
    """

    HEADER: ClassVar[str] = "fa3_fp8"
    ENTRY: ClassVar[str] = "fa3_fp8"
    PARAMS: ClassVar[str] = "Fa3Fp8FwdParams"
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**Fa3ForwardSpec.AXES, "block_n": tuple(range(_GROUP, 257, _GROUP)), "stages": (1, 2, 3, 4)}
    )

    single_level: bool = False
    block_descales: bool = False

    def shared_tiles(self) -> tuple[int, int]:
        """With what fp8 adds."""
        q, kv = Fa3ForwardSpec.shared_tiles(self)
        return q, kv + added_bytes(self)

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """Wgmma of 8 bits, TMA loads, mbarriers, the transposition of V."""
        return FP8_INSTRUCTIONS

    def products(self) -> tuple[Product, ...]:
        """With the parts of P V."""
        return fp8_products(self, Fa3ForwardSpec.products(self))

    def misfit(self) -> str:
        """As for 16 bits, with whole steps of 32 keys and widths of whole panels."""
        return Fa3ForwardSpec.misfit(self) or misfit_of_keys(self)

    def registers_suffice(self) -> bool:
        """O and S, or a product P V in its registers, in float32, and P in 8 bits."""
        return self._registers_suffice(fp8_registers(self))

    def config(self) -> dict[str, Any]:
        """With what fp8 adds."""
        return Fa3ForwardSpec.config(self) | fp8_config(self)

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """``fa::Fa3Fp8FwdParams`` with its maps still to be encoded."""
        params = Fa3Fp8FwdParams(fwd=self.pack_forward(problem, out), tiles=self.work_tiles(problem), **descale_strides(problem))
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params
