"""What this version takes and what it does not: the one home of sizes, element types, alignment, and features that are not built."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import inf
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Final

from .errors import FeatureNotBuiltError
from .types import DType, SmArch

__all__ = [
    "BEFORE_FP8",
    "CPU_DTYPES",
    "FP8_DTYPES",
    "FP8_HEAD_DIM_STEP",
    "FP8_OUT_DTYPES",
    "GPU_DTYPES",
    "HEAD_DIM_STEP",
    "HEAD_DIM_WIDTHS",
    "LARGEST_SCORE_FACTOR",
    "MAX_GRID",
    "MAX_HEAD_DIM",
    "MAX_LENGTH",
    "MAX_SPLITS",
    "NOT_BUILT",
    "PHILOX_KEYS",
    "SCALED_TOKENS",
    "SMALLEST_SCALE",
    "UNBOUNDED",
    "VECTOR_BYTES",
    "as_integer",
    "as_real",
    "dtypes_of",
    "is_integer",
    "is_real",
    "merged_dtypes_of",
    "not_built",
]

HEAD_DIM_WIDTHS: Final = (32, 64, 96, 128, 192, 256)  # of tiles; a head dim takes the next one that holds it
MAX_HEAD_DIM: Final = HEAD_DIM_WIDTHS[-1]
HEAD_DIM_STEP: Final = 8  # of head dims on a GPU: 16 bytes of a 16-bit type; functional calls pad
GPU_DTYPES: Final = (DType.F16, DType.BF16)
CPU_DTYPES: Final = (DType.F16, DType.BF16, DType.F32, DType.F64)
FP8_DTYPES: Final = (DType.F8E4M3, DType.F8E5M2)
BEFORE_FP8: Final = frozenset({SmArch.SM_80, SmArch.SM_86})
FP8_OUT_DTYPES: Final = (DType.BF16, DType.F16, DType.F32)  # of o where k and v are fp8
FP8_HEAD_DIM_STEP: Final = 16  # of head dims of fp8: 16 bytes, everywhere; nobody pads
SCALED_TOKENS: Final = 128  # that share a descale of ScaleUnit.BLOCK
SMALLEST_SCALE: Final = 2.0**-126  # that quantising makes: a float32 below has fewer bits; cuda/kernels/fp8_append.cuh has the same
VECTOR_BYTES: Final = 16  # one cp.async, and what strides and addresses of TMA are multiples of
PHILOX_KEYS: Final = 32  # one call of the generator covers 32 keys, so no tile with dropout is narrower
UNBOUNDED: Final = 1 << 30  # a window without a bound: kUnbounded of cuda/attention/params.cuh
MAX_LENGTH: Final = UNBOUNDED - 1  # tokens of one sequence
MAX_SPLITS: Final = 128  # parts that the keys of a row may be cut into, as in flash-attn
MAX_GRID: Final = (1 << 31) - 1  # blocks of a launch, in x
LARGEST_SCORE_FACTOR: Final = 2.358e38  # of softmax_scale and softcap: times log2(e), as kernels need it, it is a float32

# Features of the design that this version refuses, and why. Building one removes its line here.
NOT_BUILT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "append": "on a GPU pages are written and copied in caches of torch and CuPy, from arrays of the same library",
        "cache_gradients": "calls on a KV cache have no gradients",
        "double_backward": "first derivatives are built; for second ones write the attention in operations of torch",
        "fa3_backward": "gradients are those of the mma.sync family, whatever family ran the forward",
        "fa3_batch_invariant": "batch-invariant calls have one family on every GPU, that of mma.sync; ask by another request",
        "forward_mode": "forward-mode derivatives are not built; use the primal, as forward_ad.unpack_dual(x).primal",
        "fp8_backward": "fp8 has no backward: convert q, k and v to bfloat16 for a call with gradients",
        "invariant_dropout": "batch-invariant calls on a GPU drop nothing; the CPU backend does both",
        "invariant_token_scales": "batch-invariant calls take descales of v that 128 tokens or more share",
        "k_dtype": "q, k and v share one type, except that k and v may be fp8",
        "kv_layout": "NHD and HND are built",
        "left_pad": "on a GPU a contiguous KV cache may have it; pack other sequences with cu_seqlens",
        "mixed_gradients": "autograd records calls whose q is a torch tensor",
        "out_dtype": "o has the type of q",
        "paged_backward": "gradients are those of calls on plain or packed K and V; a KV cache has none",
        "paged_over_ray": "a message would carry the whole cache; start an actor where the cache lies",
        "request_gradients": "autograd records flash_attn_func and its forms, no requests, no merge_states; use them or an Fa2BwdRequest",
        "slopes_gradient": "ALiBi slopes are constants: pass slopes.detach()",
        "split": "on a GPU the keys of a forward without dropout are split, plain fp8 ones by mma.sync; elsewhere a block visits all",
        "tracing": "requests read memory; flash_attn_func and its forms are operators of torch where they are recorded",
        "v_dtype": "q, k and v share one type, except that k and v may be fp8",
    }
)


def not_built(feature: str, got: str = "") -> FeatureNotBuiltError:
    """The refusal of a feature of :data:`NOT_BUILT`; ``got`` says what asked for it."""
    reason = NOT_BUILT[feature]
    return FeatureNotBuiltError(feature, f"{got}; {reason}" if got else reason)


def dtypes_of(arch: SmArch) -> tuple[DType, ...]:
    """Element types of q, k and v on an architecture."""
    return (*CPU_DTYPES, *FP8_DTYPES) if arch is SmArch.CPU else GPU_DTYPES


def merged_dtypes_of(arch: SmArch) -> tuple[DType, ...]:
    """Element types of the outputs that ``merge_states`` takes on an architecture."""
    return CPU_DTYPES if arch is SmArch.CPU else (*GPU_DTYPES, DType.F32)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy, and no bool (arrays and tensors are none: reading them may wait for a GPU)."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_real(value: Any) -> float | None:
    """A real number of Python or NumPy as a float, to be compared as one: None where it is none, as a bool or an array.

    NumPy compares a float16 with limits that were rounded to float16, where the infinite one is not above them.
    """
    if not is_real(value):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction beyond every float
        return inf if value > 0 else -inf


def as_integer(value: Any) -> int | None:
    """An integer of Python or NumPy, or of an array without dimensions, as an int: None where it is none, as a bool or a float.

    An array on a GPU is waited for.
    """
    if is_integer(value):
        return int(value)
    if getattr(value, "shape", None) != () or "bool" in str(getattr(value, "dtype", "bool")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
