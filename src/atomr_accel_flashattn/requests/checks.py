"""Argument checks that dense and packed requests share. Below a request nothing is checked again.

Every message names the argument, says what it got, what is allowed, and what to do.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..arrays.new import draw_seed_and_offset
from ..arrays.read import contiguous_strides, dtype_name_of, read_array, share_memory, why_not_written
from ..arrays.torch_hooks import tangent_of
from ..errors import (
    DeviceMismatchError,
    DropoutError,
    DTypeError,
    FeatureNotBuiltError,
    HeadCountError,
    HeadDimError,
    OutputError,
    ShapeError,
    SlopesError,
    StrideError,
)
from ..limits import CPU_DTYPES, FP8_DTYPES, FP8_HEAD_DIM_STEP, GPU_DTYPES, HEAD_DIM_STEP, MAX_HEAD_DIM, NOT_BUILT, not_built
from ..problem import ArrayInfo, Dropout
from ..types import DType

if TYPE_CHECKING:
    from .options import AttentionOptions, PositionBias

__all__ = [
    "check_apart",
    "check_device",
    "check_out",
    "check_qkv",
    "check_written",
    "is_contiguous",
    "overlaps_itself",
    "read_dropout",
    "read_int32",
    "read_learned_sink",
    "read_qkv",
    "read_slopes",
    "refuse_fp8_gradients",
    "refuse_gradients",
    "steps",
]


def read_qkv(q: Any, k: Any, v: Any, *, layout: str) -> tuple[ArrayInfo, ArrayInfo, ArrayInfo]:
    """Describe q, k and v, of the rank that ``layout`` spells, as ``"(batch, length, heads, head dim)"``."""
    infos = read_array(q, "q"), read_array(k, "k"), read_array(v, "v")
    refuse_fp8_gradients(infos)
    rank = layout.count(",") + 1
    for name, info in zip("qkv", infos, strict=True):
        if len(info.shape) != rank:
            advice = "; one sequence is a batch of one: x[None]" if (len(info.shape), rank) == (3, 4) else ""
            raise ShapeError(f"{name}: got shape {info.shape} of rank {len(info.shape)}; allowed is rank {rank}, {layout}{advice}")
        refuse_gradients(info, name)
    return infos


def read_int32(array: Any, name: str, shape: tuple[int | None, ...], q: ArrayInfo, error: type[Exception]) -> ArrayInfo:
    """An int32 array on the device of q, rows of it contiguous; None in ``shape`` is any size."""
    info = read_array(array, name)
    if info.dtype_name != "int32":
        raise DTypeError(f"{name}: got type {info.dtype_name}; allowed is int32; call .int() or .astype('int32')")
    if len(info.shape) != len(shape) or any(want is not None and have != want for have, want in zip(info.shape, shape, strict=True)):
        sizes = ", ".join("blocks" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise error(f"{name}: got shape {info.shape}; allowed is ({sizes}), for a batch of {shape[0]}")
    check_device(info, name, q)
    if info.shape[-1] > 1 and info.strides[-1] != 1:
        raise error(f"{name}: got strides {info.strides}; allowed is a last stride of 1; call .contiguous() or numpy.ascontiguousarray")
    return info


def refuse_gradients(info: ArrayInfo, name: str, *, on_cache: bool = False, feature: str = "request_gradients") -> None:
    """A torch tensor that requires grad, or has a tangent, would silently get no derivative from a request.

    ``on_cache``: whether that is one on a KV cache, for which no other call has gradients either. ``feature``: what else is not built.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(info.source, torch.Tensor):
        return
    if info.source.requires_grad and torch.is_grad_enabled():
        if on_cache:
            reason = NOT_BUILT["cache_gradients"]
            raise FeatureNotBuiltError("cache_gradients", f"{name} requires grad, and {reason}; use torch.no_grad() or {name}.detach()")
        raise not_built(feature, f"{name} requires grad and gradients are enabled; use torch.no_grad() or {name}.detach()")
    if tangent_of(info.source) is not None:
        raise not_built("forward_mode", f"{name} is a dual tensor")


def refuse_fp8_gradients(infos: tuple[ArrayInfo, ...]) -> None:
    """Raise FeatureNotBuiltError where q, k or v is a torch tensor that wants a gradient, and one of them is fp8."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled() or all(info.dtype is None or not info.dtype.is_fp8 for info in infos):
        return
    for name, info in zip("qkv", infos, strict=True):
        if isinstance(info.source, torch.Tensor) and info.source.requires_grad:
            raise not_built("fp8_backward", f"{name} requires grad and gradients are enabled; use torch.no_grad() or {name}.detach()")


def check_qkv(q: ArrayInfo, k: ArrayInfo, v: ArrayInfo, names: tuple[str, str] = ("k", "v"), *, dtypes: bool = True) -> None:
    """Element types, devices, heads, head dims and last strides: what is the same for dense and packed arrays.

    ``names``: what messages call k and v. ``dtypes``: whether element types are looked at.
    """
    of_k, of_v = names
    named = (("q", q), (of_k, k), (of_v, v))
    if dtypes:
        _check_dtypes(named)
    for name, info in ((of_k, k), (of_v, v)):
        check_device(info, name, q)
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if v.shape[-2] != heads_kv:
        raise HeadCountError(f"{of_v}: got {v.shape[-2]} heads with {heads_kv} in {of_k}; allowed are equal numbers of KV heads")
    if heads < 1 or heads_kv < 1 or heads % heads_kv:
        raise HeadCountError(
            f"heads: got {heads} query heads and {heads_kv} KV heads; allowed is a multiple of the KV heads, of which there is one at least"
        )
    if k.shape[-1] != q.shape[-1]:
        raise HeadDimError(
            f"{of_k}: got head dim {k.shape[-1]} with {q.shape[-1]} in q; "
            f"allowed are equal head dims of q and {of_k} ({of_v} may have its own)"
        )
    fp8 = v.dtype is not None and v.dtype.is_fp8
    for name, info in named:
        _check_head_dim(name, info, fp8=fp8)
        if info.shape[-1] > 1 and info.strides[-1] != 1:
            raise StrideError(
                f"{name}: got strides {info.strides}; allowed is a last stride of 1; call .contiguous() or numpy.ascontiguousarray"
            )


def check_device(info: ArrayInfo, name: str, q: ArrayInfo) -> None:
    """Raise DeviceMismatchError unless an array lies on the device of q."""
    if info.device != q.device:
        raise DeviceMismatchError(
            f"{name}: got an array on {info.device} with q on {q.device}; allowed is one device for all arrays; move {name}"
        )


def _check_dtypes(named: tuple[tuple[str, ArrayInfo], ...]) -> None:
    """Of q and the others, by what messages call them."""
    _, q = named[0]
    for name, info in named:
        if info.dtype is None:
            names, narrow = (", ".join(map(dtype_name_of, dtypes)) for dtypes in (CPU_DTYPES, FP8_DTYPES))
            advice = f"view bytes of fp8 as that type, or convert {name}" if info.dtype_name in {"uint8", "int8"} else f"convert {name}"
            raise DTypeError(
                f"{name}: got type {info.dtype_name}; allowed are {names} (on a GPU float16 and bfloat16), and {narrow}; {advice}"
            )
        if info.device.kind != "cpu" and info.dtype not in GPU_DTYPES and not info.dtype.is_fp8:
            raise DTypeError(
                f"{name}: got type {info.dtype_name} on {info.device}; allowed on a GPU are float16, bfloat16 and fp8; "
                "convert, or move to the CPU"
            )
        if info.dtype is not q.dtype:
            _check_mixed(named)


def _check_mixed(named: tuple[tuple[str, ArrayInfo], ...]) -> None:
    """Types that are not all the same: k and v are fp8, and q is fp8 or of 16 bits."""
    (_, q), *others = named
    fp8 = [info.dtype is not None and info.dtype.is_fp8 for _, info in others]
    if all(fp8) and (q.dtype in GPU_DTYPES or (q.dtype is not None and q.dtype.is_fp8)):
        return
    name, info = next((name, info) for name, info in others if info.dtype is not q.dtype)
    if any(fp8):
        odd = next((other for (other, _), narrow in zip(others, fp8, strict=True) if not narrow), "q")
    else:
        odd = "q" if q.dtype is not None and q.dtype.is_fp8 else name
    raise DTypeError(
        f"{name}: got type {info.dtype_name} with {q.dtype_name} in q; allowed is one type for q, k and v, "
        f"or fp8 in {others[0][0]} and {others[1][0]} with fp8, float16 or bfloat16 in q; convert {odd}"
    )


def _check_head_dim(name: str, info: ArrayInfo, *, fp8: bool) -> None:
    size = info.shape[-1]
    if fp8 and (not 1 <= size <= MAX_HEAD_DIM or size % FP8_HEAD_DIM_STEP):
        raise HeadDimError(
            f"{name}: got head dim {size} with fp8; allowed are multiples of {FP8_HEAD_DIM_STEP} up to {MAX_HEAD_DIM}; "
            "pad with zeros, and give the softmax_scale of the head dim before"
        )
    step = 1 if info.device.kind == "cpu" else HEAD_DIM_STEP
    if not 1 <= size <= MAX_HEAD_DIM or size % step:
        what = f"1..{MAX_HEAD_DIM}" if step == 1 else f"multiples of {step} up to {MAX_HEAD_DIM}"
        pads = "; the functional calls pad to the next multiple of 8" if 1 <= size < MAX_HEAD_DIM else ""
        raise HeadDimError(f"{name}: got head dim {size} on {info.device}; allowed are {what}{pads}")


def read_slopes(bias: PositionBias, q: ArrayInfo, *, batch: int, heads: int, on_cache: bool = False) -> ArrayInfo | None:
    """ALiBi slopes, float32 (Hq,) or (B, Hq), or None."""
    return _read_per_head(bias.slopes, "alibi_slopes", q, shapes=((heads,), (batch, heads)), on_cache=on_cache)


def read_learned_sink(options: AttentionOptions, q: ArrayInfo, *, heads: int, on_cache: bool = False) -> ArrayInfo | None:
    """The learned sink, float32 (Hq,), or None."""
    return _read_per_head(options.learned_sink, "learned_sink", q, shapes=((heads,),), on_cache=on_cache)


def _read_per_head(x: Any, name: str, q: ArrayInfo, *, shapes: tuple[tuple[int, ...], ...], on_cache: bool) -> ArrayInfo | None:
    if x is None:
        return None
    info = read_array(x, name)
    refuse_gradients(info, name, on_cache=on_cache)
    if info.dtype is not DType.F32:
        raise SlopesError(f"{name}: got type {info.dtype_name}; allowed is float32; call .float() or .astype('float32')")
    if info.shape not in shapes:
        raise SlopesError(f"{name}: got shape {info.shape}; allowed is {' or '.join(str(shape) for shape in shapes)}")
    check_device(info, name, q)
    if info.shape[-1] > 1 and info.strides[-1] != 1:
        raise SlopesError(f"{name}: got strides {info.strides} for shape {info.shape}; allowed is a last stride of 1; call .contiguous()")
    return info


def steps(info: ArrayInfo) -> tuple[int, ...]:
    """Strides of all dimensions but the last; 0 where there is one element and no step is ever taken.

    Libraries give such dimensions any stride. As 0 they spoil no alignment, and a kernel that forms addresses of rows past the end (it
    loads none of them) forms those of the first row.
    """
    return tuple(step if size > 1 else 0 for size, step in zip(info.shape[:-1], info.strides[:-1], strict=True))


def is_contiguous(info: ArrayInfo) -> bool:
    """Whether elements follow each other in row-major order. Steps along dimensions of one element do not count."""
    return all(size <= 1 or have == want for size, have, want in zip(info.shape, info.strides, contiguous_strides(info.shape), strict=True))


def read_dropout(options: AttentionOptions, q: ArrayInfo) -> Dropout | None:
    """The drop probability with its (seed, offset) array, drawn now if the caller gave none; None without dropout."""
    if options.dropout_p == 0:
        return None
    rng = read_array(options.rng, "rng") if options.rng is not None else draw_seed_and_offset(q)
    if rng is None:
        raise DropoutError(
            "rng: got None, and the library of q has no generator that we know; allowed is an int64 (seed, offset) array on the device of q"
        )
    if rng.dtype_name != "int64" or rng.shape != (2,) or not is_contiguous(rng) or rng.device != q.device:
        raise DropoutError(
            f"rng: got {rng.dtype_name} of shape {rng.shape} and strides {rng.strides} on {rng.device}; "
            f"allowed is a contiguous int64 array (seed, offset) of shape (2,) on {q.device}"
        )
    return Dropout(float(options.dropout_p), rng)


def check_out(
    out: Any,
    shape: tuple[int, ...],
    inputs: tuple[ArrayInfo, ...],
    *,
    name: str = "out",
    taken: str = "q, k or v",
    others: tuple[ArrayInfo | None, ...] = (),
    dtype: DType | None = None,
) -> ArrayInfo | None:
    """The caller's output array, fit to be written; None when a new one is to be made.

    Args:
        out: what the caller gave.
        shape: what o has.
        inputs: q, whose device it is on, k, v, and what else may not be its memory.
        name: what messages call it.
        taken: what they call the inputs.
        others: lengths, tables, biases and the like, which may not be its memory either.
        dtype: its type, None is that of q.

    Raises:
        OutputError: wrong shape, type, device or strides, read-only, overlapping itself, or the memory of an input.
    """
    if out is None:
        return None
    info = check_written(out, inputs[0], shape, name=name, dtype=dtype)
    if any(share_memory(info, array) for array in inputs):
        raise OutputError(f"{name}: got the memory of {taken}, which other blocks still read; allowed is an array of its own; pass a copy")
    check_apart(info, others, name)
    return info


def check_written(array: Any, like: ArrayInfo, shape: tuple[int, ...] | None = None, *, name: str, dtype: DType | None = None) -> ArrayInfo:
    """An array of the caller's that is to be written, on the device of ``like``, of its shape and type unless others are named.

    Raises:
        OutputError: wrong shape, type, device or strides, read-only, or overlapping itself.
    """
    info, shape = read_array(array, name), like.shape if shape is None else shape
    refuse_gradients(info, name)
    if (info.shape, info.dtype, info.device) != (shape, dtype or like.dtype, like.device):
        raise OutputError(
            f"{name}: got {info.dtype_name} of shape {info.shape} on {info.device}; "
            f"allowed is {dtype_name_of(dtype) if dtype else like.dtype_name} of shape {shape} on {like.device}"
        )
    reason = why_not_written(info)
    if reason:
        raise OutputError(f"{name}: got {reason}; allowed is a writeable array; pass a copy")
    if info.shape[-1] > 1 and info.strides[-1] != 1:
        raise OutputError(f"{name}: got strides {info.strides}; allowed is a last stride of 1; pass a contiguous array")
    if overlaps_itself(info):
        raise OutputError(
            f"{name}: got strides {info.strides} for shape {info.shape}, where elements share memory; "
            "allowed is an array of its own; pass a copy"
        )
    return info


def check_apart(info: ArrayInfo, others: tuple[ArrayInfo | None, ...], name: str) -> None:
    """Raise OutputError where an array to be written has memory of lengths, tables, biases and the like, which other blocks still read."""
    if any(each is not None and share_memory(info, each) for each in others):
        raise OutputError(
            f"{name}: got memory of lengths, a table, padding, rotary embedding, slopes, a sink, a seed or descales, "
            "which other blocks still read; allowed is an array of its own; pass a copy"
        )


def overlaps_itself(info: ArrayInfo) -> bool:
    """Whether two elements may share an address; an interleaving that this simple nesting test cannot prove apart counts as shared."""
    reach = 0
    for size, step in sorted(zip(info.shape, info.strides, strict=True), key=lambda pair: abs(pair[1])):
        if size > 1:
            if abs(step) <= reach:
                return True
            reach += (size - 1) * abs(step)
    return False
