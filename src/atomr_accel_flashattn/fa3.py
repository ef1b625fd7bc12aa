"""Fa3FwdRequest: a dense forward call by the wgmma family (FlashAttention-3), and how its tiles are handed to the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .dispatch import DispatchKey, best_arch, key_of_problem
from .errors import DTypeError, ScheduleError
from .kernels.spec import Family
from .requests.dense import DenseFwdRequest
from .types import SmArch

__all__ = ["Fa3FwdFp8Request", "Fa3FwdRequest", "PersistentMode"]


@dataclass(frozen=True, slots=True)
class PersistentMode:
    """Who takes which tile of rows: one block each, or fewer blocks that take tile after tile.

    Attributes:
        persistent: None lets the launch choose: persistent when there are more tiles than SMs.
        blocks: how many persistent blocks; None is one per SM.

    Raises:
        ScheduleError: ``blocks`` that is no positive integer, or without ``persistent``; ``persistent`` that is no bool.
    """

    persistent: bool | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.persistent is not None and not isinstance(self.persistent, bool):
            raise ScheduleError(
                f"PersistentMode: got persistent={self.persistent!r}; allowed are True, False, and None for the launch to choose"
            )
        if self.blocks is not None and not (self.persistent is True and type(self.blocks) is int and self.blocks > 0):
            raise ScheduleError(f"PersistentMode: got {self.blocks!r} blocks; allowed is a positive integer, with persistent=True")

    @classmethod
    def auto(cls) -> PersistentMode:
        """Whatever suits the number of tiles."""
        return cls()

    @classmethod
    def Grid(cls) -> PersistentMode:  # noqa: N802 - the name of the choice, as users write it
        """One block per tile."""
        return cls(persistent=False)

    @classmethod
    def Persistent(cls, num_sms: int | None = None) -> PersistentMode:  # noqa: N802 - as above
        """``num_sms`` blocks, None is one per SM; each takes tiles from a counter."""
        return cls(persistent=True, blocks=num_sms)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fa3FwdRequest(DenseFwdRequest):
    """Attention by FlashAttention-3 (arXiv 2407.08608) on Hopper. Attributes and errors: DenseFwdRequest.

    On sm_100 and sm_120, which have no wgmma, it resolves to the mma.sync family; before Hopper it is refused.

    Attributes:
        persistent: how tiles are handed to blocks.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("persistent",)

    persistent: PersistentMode = field(default=PersistentMode.auto(), kw_only=True)

    def __post_init__(self) -> None:
        mode: Any = self.persistent
        if not isinstance(mode, PersistentMode):
            raise ScheduleError(f"persistent: got {mode!r}; allowed is a PersistentMode, as PersistentMode.Persistent()")
        DenseFwdRequest.__post_init__(self)  # a class with slots has no zero-argument super()

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """The key of this request on ``arch``; None is the best one for the device of q."""
        arch, mode = arch or best_arch(self.problem.q.device), self.persistent
        return key_of_problem(self.problem, arch, self.out_array, Family.FA3, persistent=mode.persistent, persistent_blocks=mode.blocks)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Fa3FwdFp8Request(Fa3FwdRequest):
    """An Fa3FwdRequest whose k and v are fp8, each e4m3 or e5m2; q is fp8 too, of its own type, or of 16 bits (arXiv 2407.08608, 3.3).

    Attributes and errors: Fa3FwdRequest. With 16 bits in q it resolves to the mma.sync family, which has a block for each tile: then
    ``persistent`` changes nothing. ``fp8`` has the descales, and the type of o. Refused: dropout, and torch tensors that want
    gradients.

    Raises:
        DTypeError: k or v that is not fp8.
    """

    PLAN_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("persistent",)

    def __post_init__(self) -> None:
        Fa3FwdRequest.__post_init__(self)
        if self.problem.descales is None:
            raise DTypeError(
                f"k, v: got types {self.problem.k.dtype_name} and {self.problem.v.dtype_name}; allowed are float8_e4m3fn and "
                "float8_e5m2; quantise them, or use an Fa3FwdRequest"
            )
