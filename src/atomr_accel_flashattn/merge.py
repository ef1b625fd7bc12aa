"""merge_states: attention over two sets of keys from the attention over each, as a split, a cascade or a ring of devices leaves them."""

from __future__ import annotations

from typing import Any

from .arrays.new import empty_like_framework, in_library_of
from .arrays.read import as_numpy, read_array
from .errors import DeviceMismatchError, DTypeError, ShapeError
from .limits import CPU_DTYPES, not_built
from .reference.merge import merge
from .requests.checks import refuse_gradients
from .types import DType

__all__ = ["merge_states"]


def merge_states(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    """O and LSE over the keys of two calls that had the same queries and no key in common (FlashAttention, arXiv 2205.14135, section 3.1).

    LSEs are natural logarithms. A state without keys, (0, -inf), leaves the other one as it is, bit for bit. A learned sink belongs into
    one of the two calls. LSEs are float32, so float64 outputs are right to 1e-7 of their size. In host memory only.

    Args:
        o1: (B, Sq, Hq, Dv) or (total_q, Hq, Dv), float16, bfloat16, float32 or float64.
        lse1: float32 (B, Hq, Sq) or (Hq, total_q).
        o2: like o1.
        lse2: like lse1.

    Returns:
        o like o1, and the LSE like lse1, in the library of o1.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError: arrays that do not fit together.
        FeatureNotBuiltError: arrays on a GPU, or torch tensors that want gradients.
    """
    names = ("o1", "lse1", "o2", "lse2")
    infos = first, first_lse, second, second_lse = tuple(map(read_array, (o1, lse1, o2, lse2), names))
    for name, info in zip(names, infos, strict=True):
        refuse_gradients(info, name)
        if info.device != first.device:
            raise DeviceMismatchError(
                f"{name}: got an array on {info.device} with o1 on {first.device}; allowed is one device; move {name}"
            )
    if first.dtype not in CPU_DTYPES or second.dtype is not first.dtype:
        raise DTypeError(
            f"o2: got {second.dtype_name} with {first.dtype_name} in o1; allowed are float16, bfloat16, float32 and float64, equal"
        )
    if len(first.shape) not in {3, 4} or second.shape != first.shape:
        raise ShapeError(f"o2: got shape {second.shape} with {first.shape} in o1; allowed are equal (B, Sq, Hq, Dv) or (total_q, Hq, Dv)")
    *lead, rows, heads, _ = first.shape
    for name, info in (("lse1", first_lse), ("lse2", second_lse)):
        if info.dtype is not DType.F32:
            raise DTypeError(f"{name}: got type {info.dtype_name}; allowed is float32")
        if info.shape != (*lead, heads, rows):
            raise ShapeError(f"{name}: got shape {info.shape}; allowed is {(*lead, heads, rows)}, that of the LSE of o1")
    if first.device.kind != "cpu":
        raise not_built("merge_states", f"got arrays on {first.device}")
    out, lse = empty_like_framework(first, first.shape), empty_like_framework(first, first_lse.shape, "float32")
    merge(((as_numpy(first), as_numpy(first_lse)), (as_numpy(second), as_numpy(second_lse))), as_numpy(out), as_numpy(lse))
    return in_library_of(first, out), in_library_of(first, lse)
