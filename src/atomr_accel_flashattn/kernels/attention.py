"""What the specs of forward and backward kernels share: the fields that change machine code, and ``fa::Config`` of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

from ..types import DType
from .spec import KernelSpec, Tile, config_text

__all__ = ["AttentionSpec"]

_REGISTER_FILE: Final = 65536  # of an SM
_MOST_REGISTERS: Final = 255  # of a thread

_SOURCE: Final = """\
#include "kernels/{header}.cuh"

extern "C" __global__ void __launch_bounds__({bounds}) {name}(const __grid_constant__ fa::{params} p) {{
  fa::{entry}<fa::Config{{
{config}
  }}>(p);
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec(KernelSpec):
    """A kernel that reads q, k and v. ``head_dim`` and ``v_head_dim`` are tile widths (32, 64, 96, 128, 192, 256), not the user's sizes."""

    ENTRY: ClassVar[str]  # the function of the header
    PARAMS: ClassVar[str]  # the struct that it takes
    # Fields of Tile that the kernel reads, with the values that a search tries; none: one tile.
    AXES: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})

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
    scale_first: bool = False  # scale before the maximum: needed when softmax_scale <= 0
    learned_sink: bool = False
    dropout: bool = False
    varlen: bool = False
    pack_gqa: bool = False  # the rows of Q are those of all query heads that share K and V
    # Types that differ from that of q; None: the same.
    k_dtype: DType | None = None
    v_dtype: DType | None = None
    out_dtype: DType | None = None

    @property
    def kernel_name(self) -> str:
        """Header, architecture, type, widths, tile, and every flag that is set."""
        head = str(self.head_dim) if self.head_dim == self.v_head_dim else f"{self.head_dim}v{self.v_head_dim}"
        types = [self.dtype.value, *(f"{name[0]}{dtype.value}" for name, dtype in self._other_types().items())]
        parts = [self.HEADER, self.arch.value.replace("_", ""), *types, f"d{head}", str(self.tile), *self.names_of_set_flags()]
        parts += [name for name, on in (("padded", not self.exact_head_dim), ("unaligned", not self.aligned)) if on]
        return "_".join(parts)

    @property
    def k_type(self) -> DType:
        """The element type of k."""
        return self.k_dtype or self.dtype

    @property
    def v_type(self) -> DType:
        """The element type of v."""
        return self.v_dtype or self.dtype

    @property
    def out_type(self) -> DType:
        """The element type of o."""
        return self.out_dtype or self.dtype

    def _other_types(self) -> dict[str, DType]:
        """Those fields of types that are set, which ``fa::Config`` has too."""
        return {name: dtype for name in ("k_dtype", "v_dtype", "out_dtype") if (dtype := getattr(self, name)) is not None}

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.tile.threads

    @property
    def persistent(self) -> bool:
        """Whether blocks take tile after tile."""
        return self.tile.persistent

    @property
    def launch_bounds(self) -> str:
        """Threads a block, and where the compiler is told so, the blocks that an SM shall hold."""
        return str(self.threads)

    def misfit(self) -> str:
        """Why there can be no kernel with this tile; empty when there can.

        What is so for every kernel is in tiles/space.py.
        """
        return ""

    def registers_suffice(self) -> bool:
        """Whether what a thread surely holds leaves room for the rest; ptxas has the last word."""
        return True

    def registers_hold(self, numbers: int) -> bool:
        """Whether a thread can have so many registers, with the blocks of an SM that the tile asks for."""
        return numbers <= min(_MOST_REGISTERS, _REGISTER_FILE // (self.tile.threads * self.tile.min_blocks))

    def body(self) -> str:
        """One include and one entry."""
        return _SOURCE.format(
            header=self.HEADER,
            bounds=self.launch_bounds,
            name=self.kernel_name,
            params=self.PARAMS,
            entry=self.ENTRY,
            config=config_text(self.config() | self.types_config()),
        )

    def config(self) -> dict[str, Any]:
        """Members of ``fa::Config``, in their order."""
        return {
            "dtype": f"fa::DType::{self.dtype.name}",
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim,
            "block_m": self.tile.block_m,
            "block_n": self.tile.block_n,
            "warps": self.tile.warps,
            "stages": self.tile.stages,
            "exact_head_dim": self.exact_head_dim,
            "aligned": self.aligned,
            "left_bound": self.left_bound,
            "right_bound": self.right_bound,
            "sink_tokens": self.sink_tokens,
            "alibi": self.alibi,
            "softcap": self.softcap,
            "scale_first": self.scale_first,
            "learned_sink": self.learned_sink,
            "dropout": self.dropout,
            "varlen": self.varlen,
            "pack_gqa": self.pack_gqa,
            "ping_pong": self.tile.ping_pong,
            "persistent": self.tile.persistent,
        }

    def types_config(self) -> dict[str, Any]:
        """Members behind all others."""
        return {name: f"fa::DType::{dtype.name}" for name, dtype in self._other_types().items()}
