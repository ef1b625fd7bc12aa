"""Register spills that are known and accepted: bytes as ptxas reports them (stores and loads per thread), and why.

A kernel that spills more than its entry allows, or spills without one, fails tests/compile.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

__all__ = ["KNOWN_SPILLS", "Spill", "allowed_spill"]


class Spill(NamedTuple):
    """Kernels whose ``KernelSpec.kernel_name`` matches ``pattern`` may spill ``bytes``, because of ``reason``."""

    pattern: str
    bytes: int
    reason: str


_INVARIANTS = (
    "two blocks of 4 warps leave 255 registers a thread; accumulators of O and S and the fragments of Q and K fill them. What spills are "
    "loop invariants (tensor addresses, mask bounds): stored once before the key loop, a few loads per key tile, never an accumulator"
)

_STATE = (
    "the same on two architectures that no card was at hand for: where a right bound meets another feature, running maxima and sums spill "
    "too, up to 16 loads and 8 stores per key tile of 800 instructions. 128 x 48 would not spill on sm_100 but does on sm_80; to be "
    "decided by measurement there"
)

_MEETING = (
    "two consumer warpgroups have 240 registers a thread, and the accumulators of O and S and the fragments of P fill most of them. A few "
    "words spill where softcap or the generator of dropout meets other features; none does in a plain kernel, and a narrower tile would "
    "cost all of them a fifth of their keys or more"
)

_CROWDED = (
    "four computing warpgroups have 112 registers a thread. Where softcap meets a scale that is not positive, packed sequences and a "
    "learned sink, up to 9 loads and 4 stores per key tile of 1000 instructions spill; so rare a call is not worth a tile of its own"
)

_BACKWARD = (
    "dK, dV and what is read ahead for the products fill the 255 registers of 8 warps an SM. What spills are loop invariants (addresses in "
    "shared memory, tensor addresses, bounds), a few dozen loads at most per tile of 1200 instructions"
)

_DIVISION = (
    "a 64-bit division is a call, which leaves 40 registers to what lives across it; it cuts the work of a step, once for all its layers"
)

_DIVISIONS_OF_APPEND = "divisions of 64 bits, and exact ones of float32, are calls, which leave 40 registers to what lives across them"

_SIXTEEN_WARPS = "sixteen warps leave 128 registers a thread; a loop invariant spills where the order of sums is fixed, stored once"

_FP8 = (
    "two consumer warpgroups have 232 registers a thread beside producers that transpose V, three have 160. Windows, slopes and softcap "
    "meet the accumulators of wide heads; loop invariants spill, a few loads per work tile. A producer that leaves consumers 240 registers "
    "loads up to five addresses for each 2 KB of V, and is 4 % faster for it"
)

_THREE_BLOCKS = "168 registers a thread were 4 % faster than 180 without spills; bounds and addresses spill, stored once"

KNOWN_SPILLS = (
    Spill("step_schedule_*", 96, _DIVISION),
    Spill("step_combine_sm100_*", 8, _DIVISION),
    Spill("fp8_append_*", 24, _DIVISIONS_OF_APPEND),
    Spill("fa2_fwd_*_d64_m128n128w4s1b2*", 24, _INVARIANTS),
    Spill("fa2_fwd_*_d96_m128n64w4s1b2*", 32, _INVARIANTS),
    Spill("fa2_fwd_*_d128_m128n64w4s1b2*", 144, _INVARIANTS),
    Spill("fa2_fwd_*_d128_m128n32w4s1b2*", 128, _INVARIANTS),
    *(Spill(f"fa2_fwd_{arch}_*_d128_m128n64w4s1b2_*rightbound*", 288, _STATE) for arch in ("sm80", "sm100")),
    *(
        Spill(f"fa3_fwd_*_{widths}_m128n*w12s2*_{feature}*", 96, _MEETING)
        for widths in ("d192v128", "d192", "d64v256", "d256")
        for feature in ("softcap", "dropout")
    ),
    Spill("fa3_fp8_*_d192_m128n128w12s2*", 24, _FP8),
    Spill("fa3_fp8_*_d256_m128n128w12s2*", 152, _FP8),
    Spill("fa3_fp8_*e5m2*_d256_m128n96w12s2*", 184, _FP8),
    Spill("fa2_bwd_*_d64_m64n128w4s3b*", 320, _BACKWARD),
    Spill("fa2_bwd_*_d96_m64n128w8s2b1*", 32, _BACKWARD),
    Spill("fa2_bwd_*_d128_m64n128w8s2b1*", 192, _BACKWARD),
    Spill("fa2_bwd_*_d256_m64n64w8s*", 160, _BACKWARD),
    Spill("fa2_kvcache_*_d96_m64n32w16s2b1_*batchinvariant*", 8, _SIXTEEN_WARPS),
    Spill("fa2_kvcache_*_d128*_m32n32w4s2b3*", 32, _THREE_BLOCKS),
    Spill("fa3_fwd_*_d64_m256n64w20s4*_softcap_scalefirst_learnedsink_varlen*", 80, _CROWDED),
    Spill("fa3_kvcache_*_d64_m256n64w20s4*_softcap_scalefirst_learnedsink_varlen*", 24, _CROWDED),
)


def allowed_spill(kernel_name: str) -> int:
    """Bytes that this kernel may spill; 0 for most."""
    return max((spill.bytes for spill in KNOWN_SPILLS if fnmatchcase(kernel_name, spill.pattern)), default=0)
