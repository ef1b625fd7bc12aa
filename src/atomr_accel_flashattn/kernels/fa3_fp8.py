"""The forward kernel of the wgmma family over fp8 tensors: ``cuda/kernels/fa3_fp8.cuh`` (arXiv 2407.08608, section 3.3)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..limits import SCALED_TOKENS
from ..problem import ArrayInfo, AttentionProblem
from .fa3_fwd import Fa3ForwardSpec, consumer_holds
from .forward import DESCALE_SLOTS, FwdParams, descale_strides
from .params import KernelParams, StrideParams, TensorMapParams
from .spec import Tile
from .wgmma import Product

__all__ = [
    "FP8_INSTRUCTIONS",
    "FP8_WIDTHS",
    "Fa3Fp8ForwardSpec",
    "Fa3Fp8FwdParams",
    "fp8_config",
    "fp8_products",
    "fp8_registers",
    "fp8_width",
    "loaded_bytes",
    "misfit_of_keys",
]

FP8_WIDTHS: Final = (64, 128, 192, 256)  # rows of tiles are whole panels of 64 or 128 bytes
_MOST_COLUMNS: Final = 128  # of O in one product: two of them are faster than one of 256
_MOST_LOADED: Final = 2  # buffers of V before it is transposed
_GROUP: Final = 32  # keys of a step of wgmma
FP8_INSTRUCTIONS: Final = ("QGMMA", "UTMALDG", "SYNCS", "LDSM", "STSM")


def fp8_width(head_dim: int) -> int:
    """The tile width that holds a head dim of 16..256."""
    return next(width for width in FP8_WIDTHS if width >= head_dim)


def loaded_bytes(tile: Tile, v_head_dim: int) -> int:
    """Of the buffers of V before it is transposed."""
    return min(tile.stages, _MOST_LOADED) * tile.block_n * v_head_dim


def pv_columns(v_head_dim: int) -> int:
    """Columns of O in one product P V whose accumulators take the registers of S."""
    return v_head_dim // -(-v_head_dim // _MOST_COLUMNS)


def pv_sum(tile: Tile, v_head_dim: int, *, single_level: bool) -> str:
    """The ``fa::PvSum`` of a tile: beside O where registers hold both, S and P."""
    if single_level:
        return "InO"
    return "Beside" if consumer_holds(tile, v_head_dim + tile.block_n // 2 + tile.block_n // 8) else "InScores"


def fp8_products(products: tuple[Product, ...], tile: Tile, *, single_level: bool) -> tuple[Product, ...]:
    """Q K^T, and P V at once or in equal parts."""
    qk, (width, p_type, v_type) = products
    if pv_sum(tile, width, single_level=single_level) != "InScores":
        return products
    return qk, (pv_columns(width), p_type, v_type)


def misfit_of_keys(tile: Tile, *, block_descales: bool) -> str:
    """Why there can be no kernel with these keys of a tile; empty when there can."""
    if tile.block_n % _GROUP:
        return f"block_n: got {tile.block_n}; allowed are multiples of {_GROUP}"
    if block_descales and SCALED_TOKENS % tile.block_n:
        return f"block_n: got {tile.block_n}; allowed with factors of blocks are divisors of {SCALED_TOKENS}"
    return ""


def fp8_registers(tile: Tile, v_head_dim: int, *, single_level: bool) -> int:
    """Of a consumer thread beside O and S: P, and what a product P V has more than S."""
    wider = 0 if single_level else max(0, pv_columns(v_head_dim) - tile.block_n)
    return wider // 2 + tile.block_n // 8


def fp8_config(tile: Tile, v_head_dim: int, *, single_level: bool, block_descales: bool) -> dict[str, Any]:
    """Members of ``fa::Config`` that fp8 adds: factors of blocks, and how P V gets into O."""
    how = pv_sum(tile, v_head_dim, single_level=single_level)
    return {"block_descales": block_descales, "pv_sum": f"fa::PvSum::{how}", "pv_columns": pv_columns(v_head_dim)}


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
        return q, kv + loaded_bytes(self.tile, self.v_head_dim)

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """Wgmma of 8 bits, TMA loads, mbarriers, the transposition of V."""
        return FP8_INSTRUCTIONS

    def products(self) -> tuple[Product, ...]:
        """With the parts of P V."""
        return fp8_products(Fa3ForwardSpec.products(self), self.tile, single_level=self.single_level)

    def misfit(self) -> str:
        """As for 16 bits, with whole steps of 32 keys and widths of whole panels."""
        return Fa3ForwardSpec.misfit(self) or misfit_of_keys(self.tile, block_descales=self.block_descales)

    def registers_suffice(self) -> bool:
        """O and S, or a product P V in its registers, in float32, and P in 8 bits."""
        return self._registers_suffice(fp8_registers(self.tile, self.v_head_dim, single_level=self.single_level))

    def config(self) -> dict[str, Any]:
        """With what fp8 adds."""
        return Fa3ForwardSpec.config(self) | fp8_config(
            self.tile, self.v_head_dim, single_level=self.single_level, block_descales=self.block_descales
        )

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """``fa::Fa3Fp8FwdParams`` with its maps still to be encoded."""
        params = Fa3Fp8FwdParams(fwd=self.pack_forward(problem, out), tiles=self.work_tiles(problem), **descale_strides(problem))
        params.tensor_maps = self.tensor_maps(problem)
        params.counts = self.tile.persistent
        return params
