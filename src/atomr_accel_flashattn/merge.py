"""merge_states: attention over two sets of keys from the attention over each, as a split, a cascade or a ring of devices leaves them."""

from __future__ import annotations

from typing import Any

from .arrays.new import empty_like_framework, in_library_of
from .arrays.read import as_numpy, read_array, share_memory
from .arrays.torch_hooks import tell_written
from .dispatch import best_arch
from .errors import DeviceMismatchError, DTypeError, OutputError, ShapeError
from .kernels.merge_states import States
from .limits import merged_dtypes_of
from .problem import ArrayInfo
from .reference.merge import merge
from .requests.checks import check_written, refuse_gradients
from .runtime.merging import merge_on_gpu
from .types import DType

__all__ = ["merge_states"]


def merge_states(o1: Any, lse1: Any, o2: Any, lse2: Any, *, out: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """O and LSE over the keys of two calls that had the same queries and no key in common (FlashAttention, arXiv 2205.14135, section 3.1).

    LSEs are natural logarithms. A state without keys, (0, -inf), leaves the other one as it is, bit for bit; two of them make one. The
    states may change places: the result has the same bits. A learned sink belongs into one of the two calls. LSEs are float32, so float64
    outputs are right to 1e-7 of their size. On a GPU it is one kernel on the current stream of o1's library.

    Args:
        o1: (B, Sq, Hq, Dv) or (total_q, Hq, Dv), float16, bfloat16 or float32, in host memory float64 too; any strides.
        lse1: float32 (B, Hq, Sq) or (Hq, total_q); any strides.
        o2: like o1.
        lse2: like lse1.
        out: (o, lse) to be written, with a last stride of 1: new arrays, or just those of one state, which then accumulates. None is new
            arrays.

    Returns:
        o like o1, and the LSE like lse1, in the library of o1; or those of ``out``.

    Raises:
        ShapeError, DTypeError, DeviceMismatchError: arrays that do not fit together.
        OutputError: ``out`` that does not fit, or shares memory with what is read otherwise than as one whole state.
        FeatureNotBuiltError: torch tensors that want gradients.
        RuntimeFlashAttnError: no driver, no compiler, a kernel that does not compile or launch.
    """
    first, first_lse, second, second_lse = given = _read(o1, lse1, o2, lse2)
    if out is None:
        merged = empty_like_framework(first, first.shape), empty_like_framework(first, first_lse.shape, "float32")
    else:
        merged = _read_out(out, given)
    states = States(*given, *merged)
    if first.device.kind == "cpu":
        merge(((as_numpy(first), as_numpy(first_lse)), (as_numpy(second), as_numpy(second_lse))), *map(as_numpy, merged))
    else:
        merge_on_gpu(states)
    if out is not None:
        for each in merged:
            tell_written(each.source)
        return out[0], out[1]
    return in_library_of(first, merged[0]), in_library_of(first, merged[1])


def _read(*arrays: Any) -> tuple[ArrayInfo, ArrayInfo, ArrayInfo, ArrayInfo]:
    names = ("o1", "lse1", "o2", "lse2")
    infos = first, first_lse, second, second_lse = tuple(map(read_array, arrays, names))
    for name, info in zip(names, infos, strict=True):
        refuse_gradients(info, name)
        if info.device != first.device:
            raise DeviceMismatchError(
                f"{name}: got an array on {info.device} with o1 on {first.device}; allowed is one device; move {name}"
            )
    allowed = merged_dtypes_of(best_arch(first.device))
    if first.dtype not in allowed or second.dtype is not first.dtype:
        names_of_types = "float16, bfloat16" + (", float32 and float64" if DType.F64 in allowed else " and, on a GPU too, float32")
        raise DTypeError(f"o2: got {second.dtype_name} with {first.dtype_name} in o1; allowed are {names_of_types}, equal")
    if len(first.shape) not in {3, 4} or second.shape != first.shape:
        raise ShapeError(f"o2: got shape {second.shape} with {first.shape} in o1; allowed are equal (B, Sq, Hq, Dv) or (total_q, Hq, Dv)")
    *lead, rows, heads, _ = first.shape
    for name, info in (("lse1", first_lse), ("lse2", second_lse)):
        if info.dtype is not DType.F32:
            raise DTypeError(f"{name}: got type {info.dtype_name}; allowed is float32")
        if info.shape != (*lead, heads, rows):
            raise ShapeError(f"{name}: got shape {info.shape}; allowed is {(*lead, heads, rows)}, that of the LSE of o1")
    return first, first_lse, second, second_lse


def _read_out(out: Any, given: tuple[ArrayInfo, ArrayInfo, ArrayInfo, ArrayInfo]) -> tuple[ArrayInfo, ArrayInfo]:
    """The arrays of the caller: of their own, or in the place of one state, whose elements they then read before they write."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise OutputError(f"out: got {type(out).__qualname__}; allowed are None and (o, lse)")
    read: list[ArrayInfo] = []
    for name, array, likes in (("out[0]", out[0], given[::2]), ("out[1]", out[1], given[1::2])):
        info = check_written(array, likes[0], name=name)
        replaced = [each for each in likes if (each.ptr, each.strides) == (info.ptr, info.strides)]
        others = [each for each in given if not any(each is one for one in replaced)]
        if any(share_memory(info, each) for each in (*others, *read)):
            raise OutputError(f"{name}: got memory of a state, or of the other output; allowed is its own, or just that of o1 or o2, whole")
        read.append(info)
    return read[0], read[1]
