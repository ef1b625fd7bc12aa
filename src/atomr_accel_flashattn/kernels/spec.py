"""KernelSpec: everything that changes machine code, and nothing else. Equal specs give equal source and one cubin.

Each kernel header has one class here, in the module of the header's name (``cuda/kernels/fa2_fwd.cuh``: ``kernels/fa2_fwd.py``). The class
answers all that the rest of the package asks of a kernel: source, threads, shared memory, instructions to expect, grid, and how a problem
becomes its parameters. Nobody outside asks which kernel it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from ..problem import ArrayInfo, AttentionProblem
from ..types import DType, SmArch
from .params import KernelParams

__all__ = ["Family", "KernelSpec", "SimpleKernelSpec", "Tile"]


class Family(Enum):
    """Which instructions do the products: ``FA2`` mma.sync, ``FA3`` wgmma."""

    FA2 = "fa2"
    FA3 = "fa3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How work is cut: rows of Q and of K/V per step, warps a block, K/V stages, and how many blocks an SM shall hold."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    min_blocks: int = 1
    ping_pong: bool = False  # FA3: consumer warpgroups issue their products in turn
    persistent: bool = False  # blocks take tile after tile

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.warps * 32

    def __str__(self) -> str:
        letters = "".join(letter for letter, on in zip("ip", (self.ping_pong, self.persistent), strict=True) if on)
        return f"m{self.block_m}n{self.block_n}w{self.warps}s{self.stages}{letters}b{self.min_blocks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec(ABC):
    """One compiled kernel."""

    HEADER: ClassVar[str]  # under cuda/kernels/, without its ending; names of kernels begin with it and the architecture
    FAMILY: ClassVar[Family]

    arch: SmArch

    @property
    def family(self) -> Family:
        """Which instructions do its products."""
        return self.FAMILY

    @property
    @abstractmethod
    def kernel_name(self) -> str:
        """Canonical name: the entry point of the cubin, a benchmark row, a test id."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads per block."""

    @property
    @abstractmethod
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory per block."""

    @property
    @abstractmethod
    def expected_instructions(self) -> tuple[str, ...]:
        """SASS opcodes that must appear; CI disassembles and looks for them."""

    @property
    def persistent(self) -> bool:
        """Whether blocks take tile after tile."""
        return False

    def source(self) -> str:
        """CUDA C++ that defines the one kernel ``kernel_name``. Equal specs give equal text."""
        return self.leaves() + self.body()

    def leaves(self) -> str:
        """Instructions that have to be written out for this kernel."""
        return ""

    @abstractmethod
    def body(self) -> str:
        """The kernel without those: one include and one entry."""

    @abstractmethod
    def work_tiles(self, problem: AttentionProblem) -> int:
        """How many tiles of work a problem is; 0 when there is nothing to do."""

    def steps(self) -> tuple[KernelSpec, ...]:
        """The kernels of a call that is answered by this one, in the order of their launches."""
        return (self,)

    def grid(self, tiles: int, multiprocessors: int, blocks: int | None = None) -> int:  # noqa: ARG002 - persistent kernels ask for them
        """Thread blocks of a launch over ``tiles`` on a GPU of so many SMs; ``blocks``: how many persistent ones the caller wants."""
        return tiles

    @abstractmethod
    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """Parameters of one call, all but addresses, which every launch brings."""

    def names_of_set_flags(self) -> list[str]:
        """Boolean fields that are off by default and on here, as parts of a kernel's name."""
        return [f.name.replace("_", "") for f in fields(self) if f.type == "bool" and f.default is False and getattr(self, f.name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleKernelSpec(KernelSpec):
    """A kernel without products and without shared memory, for any architecture."""

    FAMILY: ClassVar[Family] = Family.FA2
    THREADS: ClassVar[int]

    @property
    def kernel_name(self) -> str:
        """Header, architecture, type, and every flag that is set."""
        types = [value.value for f in fields(self) if isinstance(value := getattr(self, f.name), DType)]
        return "_".join([self.HEADER, self.arch.value.replace("_", ""), *types, *self.names_of_set_flags()])

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.THREADS

    @property
    def shared_memory(self) -> int:
        """None."""
        return 0


def config_text(members: Mapping[str, Any]) -> str:
    """Designated initialisers of a Config of CUDA C++, one a line."""
    return ",\n".join(f"    .{name} = {literal(value)}" for name, value in members.items())


def literal(value: Any) -> str:
    """A number, a name or a bool as CUDA C++ writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
