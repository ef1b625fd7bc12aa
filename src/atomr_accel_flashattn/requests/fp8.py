"""What a call with fp8 K and V has besides: descales and the type of o, checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, TypeAlias

from ..arrays.read import dtype_name_of, read_array, share_memory, why_not_written
from ..errors import ArrayTypeError, DescaleError, DropoutError, OutputError
from ..limits import FP8_OUT_DTYPES, SCALED_TOKENS
from ..problem import ArrayInfo, AttentionProblem, Descale, Descales, Strides
from ..runtime.staleness import arrays_beside
from ..types import DType, ScaleUnit
from .checks import check_device, overlaps_itself, refuse_gradients
from .options import Fp8Options

__all__ = ["Scales", "fp8_of", "is_fp8", "with_fp8"]

# (q_descale, k_descale, v_descale) of a functional call
Scales: TypeAlias = tuple[Any, Any, Any]

_NOTHING: Final = Fp8Options()


def fp8_of(v: Any, descales: Scales, out: Any) -> Fp8Options | None:
    """The options of a functional call, where there is something to say: with fp8 ``v``, o has the type of ``out``.

    Raises:
        OutputError: an ``out`` of a type that o has not.
    """
    q_descale, k_descale, v_descale = descales
    undescaled = q_descale is k_descale is v_descale is None
    if undescaled and out is None:
        return None
    fp8 = is_fp8(read_array(v, "v"))
    if undescaled and not fp8:
        return None
    info = read_array(out, "out") if fp8 and out is not None else None
    if info is not None and info.dtype not in FP8_OUT_DTYPES:
        raise OutputError(f"out: got {info.dtype_name} with fp8 in v; allowed are {', '.join(map(dtype_name_of, FP8_OUT_DTYPES))}")
    return Fp8Options(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, out_dtype=None if info is None else info.dtype)


def is_fp8(info: ArrayInfo) -> bool:
    """Whether elements of an array are fp8."""
    return info.dtype is not None and info.dtype.is_fp8


def with_fp8(problem: AttentionProblem, options: Fp8Options | None) -> AttentionProblem:
    """``problem`` with its descales and the type of its o, which are left as they are where K and V are not fp8 and nothing is asked.

    Raises:
        ArrayTypeError: ``options`` that are none.
        DescaleError: a descale of another type or shape, or of an array that is not fp8; options without any fp8 array.
        DropoutError: dropout.
        OutputError: a descale that lies in a cache which new tokens are written to, or one by slots that cannot be written for them.
        DeviceMismatchError: a descale elsewhere than q.
    """
    given: Any = options
    if given is not None and not isinstance(given, Fp8Options):
        raise ArrayTypeError(
            f"fp8: got {type(given).__qualname__}; allowed is an Fp8Options, as Fp8Options(k_descale=scale); leave it out for none"
        )
    if not is_fp8(problem.v):
        if options is not None:
            named = ", ".join(f"{name}_descale" for name in "qkv" if getattr(options, f"{name}_descale") is not None)
            raise DescaleError(
                f"{named or 'fp8'}: got {'descales' if named else 'Fp8Options'} with {problem.k.dtype_name} in k and "
                f"{problem.v.dtype_name} in v; allowed are descales and an out_dtype with fp8 k and v; leave them out, and multiply or "
                "convert o yourself"
            )
        return problem
    options = options or _NOTHING
    if problem.dropout is not None:
        raise DropoutError(f"dropout_p: got {problem.dropout.p} with fp8 k and v; allowed is 0, because fp8 has no backward to drop for")
    out_dtype = options.out_dtype or (DType.BF16 if is_fp8(problem.q) else problem.q.dtype)
    descales = Descales(*(_read(getattr(options, f"{name}_descale"), name, problem) for name in "qkv"))
    problem = replace(problem, descales=descales, out_dtype=out_dtype, single_level=options.single_level)
    _check_written(problem)
    return problem


def _read(x: Any, of: str, problem: AttentionProblem) -> Descale | None:
    """The descale of q, k or v."""
    if x is None:
        return None
    name, scaled = f"{of}_descale", getattr(problem, of)
    if not scaled.dtype.is_fp8:
        raise DescaleError(
            f"{name}: got an array with {scaled.dtype_name} in {of}; allowed is None, because only fp8 is scaled; multiply {of}"
        )
    info = read_array(x, name)
    refuse_gradients(info, name, on_cache=problem.cache is not None, feature="fp8_backward")
    if info.dtype is not DType.F32:
        raise DescaleError(f"{name}: got type {info.dtype_name}; allowed is float32; call .float() or .astype('float32')")
    check_device(info, name, problem.q)
    return _described(info, of, problem)


def _described(info: ArrayInfo, of: str, problem: AttentionProblem) -> Descale:
    """A descale with the unit that its shape tells.

    Raises:
        DescaleError: a shape that tells none, or two.
    """
    shape, cache, name = info.shape, problem.cache, f"{of}_descale"
    heads = (problem.batch, problem.heads_kv)
    blocks = -(-(problem.seqlen_q if of == "q" else problem.seqlen_k) // SCALED_TOKENS)
    exact = cache is None and not problem.is_varlen
    fits_blocks = len(shape) == 3 and shape[:2] == heads and (shape[2] == blocks if exact else shape[2] >= blocks)
    pages = None if cache is None or not cache.paged or of == "q" else (cache.num_blocks, cache.block_size, problem.heads_kv)
    more = "" if exact else " or more"
    allowed = f"() for all elements, {heads} for a sequence and KV head, {(*heads, blocks)}{more} for blocks of {SCALED_TOKENS} tokens"
    allowed += "" if pages is None else f", and {pages} for slots of the cache"
    if len(shape) == 1:
        advice = "; call .reshape(()) on one number" if shape == (1,) else ""
        raise DescaleError(f"{name}: got shape {shape}, which may be that of the batch or of the KV heads; allowed are {allowed}{advice}")
    if fits_blocks and shape == pages:
        raise DescaleError(
            f"{name}: got shape {shape}, which fits blocks of tokens and slots of the cache; allowed are {allowed}; "
            "give one block of tokens more for the former, or another number of pages for the latter"
        )
    steps = tuple(step if size > 1 else 0 for size, step in zip(shape, info.strides, strict=True))
    if not shape:
        return Descale(info, ScaleUnit.TENSOR, Strides(0, 0, 0))
    if shape == heads:
        return Descale(info, ScaleUnit.HEAD, Strides(steps[0], 0, steps[1]))
    if fits_blocks:
        return Descale(info, ScaleUnit.BLOCK, Strides(steps[0], steps[2], steps[1]))
    if shape == pages:
        return Descale(info, ScaleUnit.TOKEN, Strides(*steps))
    raise DescaleError(f"{name}: got shape {shape}; allowed are {allowed}")


def _check_written(problem: AttentionProblem) -> None:
    """Where new tokens are written to a cache: it lies apart from descales, and so do those that are written beside it.

    Raises:
        OutputError: shared memory, or descales by slots that cannot be written.
    """
    cache, descales = problem.cache, problem.descales
    if cache is None or cache.new is None or descales is None:
        return
    written = problem.written_descales
    named = [(f"{name}_descale", each.array) for name, each in zip("qkv", descales, strict=True) if each is not None]
    for name, info in named:
        if any(share_memory(info, array) for array in (problem.k, problem.v)):
            raise OutputError(f"{name}: got memory of a cache that new tokens are written to; allowed is an array of its own; pass a copy")
        if not any(info is each for each in written):
            continue
        reason = why_not_written(info)
        if reason or overlaps_itself(info):
            reason = reason or f"strides {info.strides} for shape {info.shape}, where elements share memory"
            raise OutputError(f"{name}: got {reason}; allowed is a writeable array, because those of new tokens are written to it")
        others = (problem.q, cache.new.k, cache.new.v, *(each for each in arrays_beside(problem) if each is not info))
        if any(each is not None and share_memory(info, each) for each in others):
            raise OutputError(f"{name}: got memory of another argument, and those of new tokens are written to it; pass a copy")
