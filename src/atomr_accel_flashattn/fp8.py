"""Quantising to fp8 with descales that calls take, and the rotation of q and k that spreads outliers. In NumPy, or in operations of torch.

The scale of elements that share one is their largest magnitude over the largest number of the type, so that nothing is cut off: 1 for
zeros, else a normal float32. NaN stays NaN and has no part in it; an infinite element makes its descale infinite, and all that this
multiplies NaN. One by token depends on no other token; one by tensor, (batch, KV head) or block of 128 tokens depends on later tokens too,
so what is appended to a cache later may not fit it.
"""

from __future__ import annotations

import sys
from math import sqrt
from typing import Any, Final, NamedTuple

import numpy as np

from .arrays.read import dtype_name_of, numpy_dtype
from .errors import ArrayTypeError, CuSeqlensError, DTypeError, HeadCountError, ShapeError
from .limits import FP8_DTYPES, SCALED_TOKENS, SMALLEST_SCALE, as_integer
from .types import DType, ScaleUnit

__all__ = ["Quantized", "quantize", "rotate_outliers"]

_LARGEST: Final = {DType.F8E4M3: 448.0, DType.F8E5M2: 57344.0}
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


class Quantized(NamedTuple):
    """Elements of fp8, shaped like what was quantised, and their float32 descale: a value is an element times its descale."""

    values: Any
    descale: Any


def quantize(
    x: Any,
    dtype: DType = DType.F8E4M3,
    *,
    unit: ScaleUnit = ScaleUnit.HEAD,
    heads_kv: int | None = None,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
) -> Quantized:
    """q, k or v in fp8, with the descale that a call takes beside it. On the device of ``x``, without a wait for it.

    Args:
        x: a torch tensor or an array of NumPy, (B, S, H, D), packed (total, H, D) with ``cu_seqlens``, or pages (blocks, block size, H, D).
        dtype: F8E4M3, the more accurate one, or F8E5M2, which has range instead.
        unit: what shares a descale. TENSOR: all, (). HEAD: a sequence and KV head, (B, Hkv). BLOCK: 128 tokens of these, (B, Hkv,
            ceil(S / 128)). TOKEN: a token and head, ``x.shape[:-1]``, as it goes beside pages.
        heads_kv: KV heads, for a q that has more heads: those of a group share a descale. None is as many as ``x`` has.
        cu_seqlens: int32 (B + 1,) of the library of ``x``, where packed sequences begin. Rows that no sequence owns become 0.
        max_seqlen: of packed sequences in BLOCK, the longest length, or an upper bound. On a GPU nobody looks whether it is: tokens past
            it would have the descale of the last block.

    Raises:
        ArrayTypeError: another kind of array.
        DTypeError: a ``dtype`` that is not fp8, or an ``x`` that is no float of 16 bits or more.
        ShapeError: a rank that has no such meaning.
        HeadCountError: heads that are no multiple of ``heads_kv``.
        CuSeqlensError: no offsets; BLOCK of packed sequences without their longest length.
    """
    library = _library_of(x)
    if dtype not in FP8_DTYPES:
        raise DTypeError(f"dtype: got {dtype!r}; allowed are {' and '.join(map(str, FP8_DTYPES))}")
    if not isinstance(unit, ScaleUnit):
        raise ArrayTypeError(f"unit: got {unit!r}; allowed is a ScaleUnit, as ScaleUnit.HEAD")
    packed = cu_seqlens is not None
    if len(x.shape) != (3 if packed else 4) or not all(x.shape[-2:]):
        allowed = "(total, heads, head dim) with cu_seqlens" if packed else "(batch, length, heads, head dim), or packed with cu_seqlens"
        raise ShapeError(f"x: got shape {tuple(x.shape)}; allowed is {allowed}, and at least one head and column")
    if max_seqlen is not None and not packed:
        raise CuSeqlensError("max_seqlen: got it without cu_seqlens; allowed is None: a batch of one length has that")
    heads = x.shape[-2]
    groups = heads if heads_kv is None else as_integer(heads_kv)
    if groups is None or groups < 1 or heads % groups:
        raise HeadCountError(f"heads_kv: got {heads_kv!r} with {heads} heads; allowed is a number that divides them")
    groups = heads if unit is ScaleUnit.TOKEN else groups
    rows = library.wide(x).reshape(-1, groups, heads // groups * x.shape[-1])
    if packed:
        batch, longest = _packing(library, cu_seqlens, max_seqlen, unit, x.shape[0])
        sequence, position, owned = library.places(cu_seqlens, x.shape[0], longest)
        rows = library.only(owned[:, None, None], rows)
    else:
        batch, longest = x.shape[0], x.shape[1]
        number = library.arange(x, batch * longest)
        sequence, position = number // max(longest, 1), number % max(longest, 1)
    amax = library.largest(rows)
    blocks = -(-longest // SCALED_TOKENS) if unit is ScaleUnit.BLOCK else 1
    place = sequence * blocks + (position // SCALED_TOKENS if unit is ScaleUnit.BLOCK else 0)
    if unit is ScaleUnit.TOKEN:
        of_rows = descale = library.scale(amax, _LARGEST[dtype])
    elif unit is ScaleUnit.TENSOR:
        of_rows = descale = library.scale(library.whole(amax), _LARGEST[dtype])
    else:
        found = library.scale(library.gathered(amax, place, batch * blocks), _LARGEST[dtype])
        of_rows, descale = found[place], found.reshape(batch, blocks, groups)
    with np.errstate(invalid="ignore"):  # of infinities, which are NaN
        values = library.narrow(rows / (of_rows if unit is ScaleUnit.TENSOR else of_rows[..., None]), dtype, _LARGEST[dtype])
    shape = {ScaleUnit.TENSOR: (), ScaleUnit.HEAD: (batch, groups), ScaleUnit.TOKEN: x.shape[:-1]}.get(unit)
    descale = library.contiguous(descale.swapaxes(1, 2)) if shape is None else descale.reshape(shape)
    return Quantized(values.reshape(x.shape), descale)


def rotate_outliers(x: Any) -> Any:
    """Q or k turned by an orthonormal Hadamard matrix along the head dim, as ``x`` is: products of a q and a k that are both turned stay.

    A channel that is larger than the others, in q and k alike, spreads over all of them, so that the roundings of its product do not add
    up (arXiv 2404.00456; 2407.08608, 3.3). Signs of the Rudin-Shapiro sequence come first, so that a channel mean does not become an
    outlier. Of a head dim that is no power of two, parts of the largest one that divides it are turned. Rotary embedding goes before.

    Args:
        x: a torch tensor or an array of NumPy, (..., D), of any float type. The sums are float32. Of a tensor on a GPU all is done there,
            without a wait, and may be captured in a CUDA graph.

    Raises:
        ArrayTypeError: another kind of array.
        DTypeError: no float of 16 bits or more.
        ShapeError: no dimension.
    """
    library = _library_of(x)
    if not x.shape:
        raise ShapeError("x: got shape (); allowed is (..., head dim)")
    width = x.shape[-1]
    part = width & -width
    number = library.arange(x, width)
    ones = number & (number >> 1)
    shift = 1 << max(width.bit_length() - 1, 1).bit_length() - 1
    while shift:  # bit 0 becomes the parity of all
        ones = ones ^ (ones >> shift)
        shift //= 2
    y = library.wide(x) * (library.wide(1 - 2 * (ones & 1)) / np.float32(sqrt(part)))
    step = 1
    while step < part:
        y = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        y = library.stack(y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :])
        step *= 2
    return library.as_type(y.reshape(x.shape), x)


def _packing(library: _NumPy | _Torch, cu_seqlens: Any, max_seqlen: Any, unit: ScaleUnit, total: int) -> tuple[int, int]:
    """How many packed sequences there are, and their longest length, which is 1 where no descale depends on it.

    Raises:
        CuSeqlensError: no offsets, or no longest length where it is needed.
    """
    kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__qualname__)
    if not library.owns(cu_seqlens) or len(cu_seqlens.shape) != 1 or not len(cu_seqlens) or "int" not in str(kind):
        shape = "" if getattr(cu_seqlens, "shape", None) is None else f" of shape {tuple(cu_seqlens.shape)}"
        raise CuSeqlensError(f"cu_seqlens: got {kind}{shape}; allowed is an int32 array (batch + 1,) of the library of x")
    batch = cu_seqlens.shape[0] - 1
    if (wrong := library.wrong(cu_seqlens, total)) is not None:
        raise CuSeqlensError(
            f"cu_seqlens: got {wrong}; allowed are offsets that begin at 0, never fall, and end within the {total} rows of x"
        )
    if unit is not ScaleUnit.BLOCK:
        return batch, 1
    longest = as_integer(max_seqlen)
    least = library.longest(cu_seqlens)
    if longest is None or longest < least:
        raise CuSeqlensError(
            f"max_seqlen: got {max_seqlen!r} with packed sequences{f' of up to {least}' if least else ''}; "
            "allowed is the longest length, for descales of blocks"
        )
    return batch, max(longest, 1)


class _NumPy:
    """What of a library is needed, in NumPy."""

    def owns(self, x: Any) -> bool:
        return isinstance(x, np.ndarray)

    def wrong(self, cu_seqlens: Any, total: int) -> list[int] | None:
        """The offsets, where they are seen to be none."""
        right = cu_seqlens[0] == 0 and cu_seqlens[-1] <= total and (np.diff(cu_seqlens) >= 0).all()
        return None if right else cu_seqlens.tolist()

    def longest(self, cu_seqlens: Any) -> int:
        return int(np.diff(cu_seqlens).max(initial=0))

    def only(self, where: Any, x: Any) -> Any:
        return np.where(where, x, np.float32(0))

    def wide(self, x: Any) -> Any:
        return x.astype(np.float32)

    def arange(self, x: Any, count: int) -> Any:  # noqa: ARG002 - a library that has devices needs it
        return np.arange(count)

    def largest(self, rows: Any) -> Any:
        return np.fmax.reduce(np.abs(rows), axis=-1, initial=0)

    def whole(self, amax: Any) -> Any:
        return np.asarray(amax.max(initial=0))

    def places(self, cu_seqlens: Any, rows: int, longest: int) -> tuple[Any, Any, Any]:
        number = np.arange(rows)
        last = max(len(cu_seqlens) - 2, 0)
        sequence = np.clip(np.searchsorted(cu_seqlens, number, side="right") - 1, 0, last)
        return sequence, np.minimum(number - cu_seqlens[sequence], longest - 1), number < cu_seqlens[-1]

    def gathered(self, amax: Any, place: Any, count: int) -> Any:
        found = np.zeros((count, amax.shape[1]), np.float32)
        np.maximum.at(found, place, amax)
        return found

    def scale(self, amax: Any, largest: float) -> Any:
        return np.where(amax > 0, np.maximum(amax / np.float32(largest), np.float32(SMALLEST_SCALE)), np.float32(1)).astype(np.float32)

    def narrow(self, values: Any, dtype: DType, largest: float) -> Any:
        return np.clip(values, -largest, largest).astype(numpy_dtype(dtype_name_of(dtype)))

    def contiguous(self, x: Any) -> Any:
        return np.ascontiguousarray(x)

    def stack(self, first: Any, second: Any) -> Any:
        return np.stack((first, second), axis=-2)

    def as_type(self, values: Any, x: Any) -> Any:
        return values.astype(x.dtype)


class _Torch:
    """The same in torch, on the device of the tensor."""

    def __init__(self) -> None:
        self.torch = sys.modules["torch"]

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.torch.Tensor)

    def wrong(self, cu_seqlens: Any, total: int) -> list[int] | None:
        if cu_seqlens.device.type != "cpu" or self.torch.compiler.is_compiling():
            return None  # nobody waits for them
        return _NumPy().wrong(cu_seqlens.numpy(), total)

    def longest(self, cu_seqlens: Any) -> int:
        return 0 if cu_seqlens.device.type != "cpu" or len(cu_seqlens) < 2 else int(cu_seqlens.diff().max())

    def only(self, where: Any, x: Any) -> Any:
        return self.torch.where(where, x, 0.0)

    def wide(self, x: Any) -> Any:
        return x.float()

    def arange(self, x: Any, count: int) -> Any:
        return self.torch.arange(count, device=x.device)

    def largest(self, rows: Any) -> Any:
        return rows.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=-1)

    def whole(self, amax: Any) -> Any:
        return amax.amax() if amax.numel() else amax.new_zeros(())

    def places(self, cu_seqlens: Any, rows: int, longest: int) -> tuple[Any, Any, Any]:
        number = self.torch.arange(rows, device=cu_seqlens.device)
        last = max(len(cu_seqlens) - 2, 0)
        sequence = (self.torch.searchsorted(cu_seqlens.long(), number, right=True) - 1).clamp(0, last)
        return sequence, (number - cu_seqlens.long()[sequence]).clamp(max=longest - 1), number < cu_seqlens[-1]

    def gathered(self, amax: Any, place: Any, count: int) -> Any:
        found = amax.new_zeros((count, amax.shape[1]))
        return found.scatter_reduce(0, place[:, None].expand_as(amax), amax, "amax")

    def scale(self, amax: Any, largest: float) -> Any:
        return self.torch.where(amax > 0, (amax / largest).clamp(min=SMALLEST_SCALE), 1.0)

    def narrow(self, values: Any, dtype: DType, largest: float) -> Any:
        return values.clamp(-largest, largest).to(getattr(self.torch, dtype_name_of(dtype)))

    def contiguous(self, x: Any) -> Any:
        return x.contiguous()

    def stack(self, first: Any, second: Any) -> Any:
        return self.torch.stack((first, second), dim=-2)

    def as_type(self, values: Any, x: Any) -> Any:
        return values.to(x.dtype)


def _library_of(x: Any) -> _NumPy | _Torch:
    """Whose operations an array has.

    Raises:
        ArrayTypeError: neither NumPy nor torch.
        DTypeError: no float of 16 bits or more.
    """
    torch = sys.modules.get("torch")
    library: _NumPy | _Torch
    if isinstance(x, np.ndarray):
        library, name = _NumPy(), x.dtype.name
    elif torch is not None and isinstance(x, torch.Tensor):
        library, name = _Torch(), str(x.dtype).removeprefix("torch.")
    else:
        raise ArrayTypeError(f"x: got {type(x).__module__}.{type(x).__qualname__}; allowed are torch tensors and arrays of NumPy")
    if name not in _FLOATS:
        raise DTypeError(f"x: got type {name}; allowed are {', '.join(_FLOATS)}")
    return library
