"""fp8 calls for tests: arrays quantised with descales, the values that they mean, and the plain evaluation that bounds errors.

It shares no code with the package's CPU backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from atomr_accel_flashattn import DType, ScaleUnit

from .check import _largest, _same_pattern, _within
from .fp8_accumulator import accumulated
from .inputs import NUMPY_DTYPE
from .oracle import LSE_TOLERANCE, Precision, Tolerance, _softmax, oracle

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .check import Run
    from .inputs import Inputs

    Array = NDArray[Any]

__all__ = ["Quantised", "check_fp8", "lost_lse", "plain_fp8", "quantised"]

DTYPES = NUMPY_DTYPE | {DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn), DType.F8E5M2: np.dtype(ml_dtypes.float8_e5m2)}
TILE = 128  # keys whose probabilities are rounded against one maximum
HEADROOM = {DType.F8E4M3: 2.0**8, DType.F8E5M2: 2.0**15}  # factor on probabilities before they are rounded: it overflows nothing


@dataclass(frozen=True)
class Quantised:
    """q, k and v of a call with k and v in fp8, and ``meant``: the same call on the values that they mean, in float64."""

    q: Array
    k: Array
    v: Array
    dtypes: tuple[DType, DType, DType]
    descales: dict[str, Array]
    meant: Inputs


def quantised(inputs: Inputs, dtypes: tuple[DType, DType, DType], units: tuple[ScaleUnit | None, ...], seed: int = 0) -> Quantised:
    """The arrays of ``inputs``, of float32, over random descales of these units (None: of 1), rounded to ``dtypes``."""
    rng = np.random.default_rng(seed)
    arrays, values, descales = {}, {}, {}
    for name, dtype, unit in zip("qkv", dtypes, units, strict=True):
        wide = getattr(inputs, name)
        factor = np.ones((*wide.shape[:-1], 1), np.float32)
        if unit is not None:
            descales[f"{name}_descale"], factor = _random_descale(inputs, name, unit, rng)
        arrays[name] = (wide / factor).astype(DTYPES[dtype])
        values[name] = arrays[name].astype(np.float64) * factor
    return Quantised(arrays["q"], arrays["k"], arrays["v"], dtypes, descales, replace(inputs, dtype=DType.F32, **values))


def _random_descale(inputs: Inputs, name: str, unit: ScaleUnit, rng: np.random.Generator) -> tuple[Array, Array]:
    """One between 1/2 and 2, all of its elements different, and the factor (..., heads, 1) of every row of the array."""
    array = getattr(inputs, name)
    offsets = inputs.cu_seqlens_q if name == "q" else inputs.cu_seqlens_k
    longest = inputs.max_seqlen_q if name == "q" else inputs.max_seqlen_k
    blocks = -(-longest // 128)
    if unit is ScaleUnit.TOKEN:  # for each row of a packed array, to be laid out as the slots of a cache are
        descale = np.asarray(2.0 ** rng.uniform(-1, 1, array.shape[:-1]), np.float32)
        return descale, descale[..., None]
    by_block = (inputs.batch, inputs.heads_kv, blocks)
    shape = {ScaleUnit.TENSOR: (), ScaleUnit.HEAD: by_block[:2], ScaleUnit.BLOCK: by_block}[unit]
    descale = np.asarray(2.0 ** rng.uniform(-1, 1, shape), np.float32)
    each = np.broadcast_to(descale[..., None] if unit is ScaleUnit.HEAD else descale, by_block)
    each = np.repeat(each, array.shape[-2] // inputs.heads_kv, axis=1)  # query heads of a KV head
    factor = np.ones((*array.shape[:-1], 1), np.float32)
    for index in range(inputs.batch):
        rows = factor[index] if offsets is None else factor[int(offsets[index]) : int(offsets[index + 1])]
        rows[..., 0] = np.repeat(each[index], 128, axis=1)[:, : len(rows)].T
    return descale, factor


def plain_fp8(call: Quantised, out_dtype: DType, *, wgmma: bool = False) -> Array:
    """A plain float32 evaluation, whose probabilities are rounded as kernels do: tile by tile, against the maximum so far.

    ``wgmma``: its scores are sums of 8-bit wgmma (:func:`tests.fp8_accumulator.accumulated`).
    """
    inputs, precision = call.meant, Precision(np.dtype(np.float32), DTYPES[out_dtype])
    q_type, _, v_type = call.dtypes
    rounded = DTYPES[v_type if q_type in HEADROOM else q_type]
    headroom = np.float32(HEADROOM.get(v_type if q_type in HEADROOM else q_type, 1.0))
    out = np.full(inputs.out_shape, np.nan, DTYPES[out_dtype])
    with np.errstate(all="ignore"):
        for sequence in inputs.sequences():
            heads, queries = np.arange(inputs.heads), np.arange(len(sequence.q))
            products = _wgmma_products(inputs, call.q, call.k, sequence.index, heads, queries) if wgmma else None
            made = _softmax(inputs, sequence, heads, queries, precision, products)
            o = np.zeros((*made.probability.shape[:-1], made.v.shape[-1]), np.float32)
            top = np.zeros(made.probability.shape[:-1], np.float32)
            for start in range(0, made.probability.shape[-1], TILE):
                tile = made.probability[..., start : start + TILE]
                top = np.maximum(top, tile.max(axis=-1))
                unit = np.where(top > 0, top, 1)[..., None] / headroom
                o += ((tile / unit).astype(rounded).astype(np.float32) * unit) @ made.v[:, start : start + TILE]
            out[sequence.out_rows] = o.transpose(1, 0, 2).astype(out.dtype)
    return out


def _wgmma_products(meant: Inputs, q: Array, k: Array, index: int, heads: Array, queries: Array) -> Array:
    """q.k of some heads and queries of a sequence, (heads, queries, keys), as 8-bit wgmma sums them up, times the factors."""
    wide = meant.sequence(index)
    stored = replace(meant, q=q.astype(np.float32), k=k.astype(np.float32)).sequence(index)
    made = []
    for head in heads:
        kv_head = head // (meant.heads // meant.heads_kv)
        rows, keys = stored.q[queries, head], stored.k[:, kv_head]
        factors = _factors(rows, wide.q[queries, head])[:, None] * _factors(keys, wide.k[:, kv_head])
        made.append(accumulated(rows, keys) * factors)
    return np.stack(made)


def _factors(stored: Array, meant: Array) -> Array:
    """What the rows of an array were divided by before they were rounded; 0 for rows of zeros."""
    largest = np.nan_to_num(np.abs(stored)).argmax(axis=-1)[:, None]
    stored, meant = (np.take_along_axis(x, largest, axis=-1)[:, 0] for x in (stored, meant))
    return np.divide(meant, stored, out=np.zeros(len(stored)), where=stored != 0)


def check_fp8(name: str, call: Quantised, run: Run, out_dtype: DType, *, wgmma: bool = False) -> float:
    """Compare a run with the oracle on what the arrays mean; the bound is that of the plain evaluation. Returns the relative error.

    ``wgmma``: q and k were multiplied by 8-bit wgmma, whose accumulator truncates. Where a run is beyond the bound of exact products, that
    of products made so applies, to o and to the LSE.
    """
    exact = oracle(call.meant)
    assert run.out.shape == exact.out.shape, f"{name}: out has shape {run.out.shape}, expected {exact.out.shape}"
    assert run.out.dtype == DTYPES[out_dtype], f"{name}: out has type {run.out.dtype}, expected {out_dtype}"
    tolerance = Tolerance.of_output(out_dtype, exact.out, [plain_fp8(call, out_dtype)])
    if wgmma and _largest(run.out, exact.out) > tolerance.bound:
        tolerance = Tolerance.of_output(out_dtype, exact.out, [plain_fp8(call, out_dtype, wgmma=True)])
    _same_pattern(f"{name}: out", run.out, exact.out.astype(DTYPES[out_dtype]))
    _within(f"{name}: out", run.out, exact.out, tolerance.bound, f"2 x {tolerance.plain_error:.3e} (plain evaluation) + floor")
    if run.lse is not None:
        _same_pattern(f"{name}: lse", run.lse, exact.lse)
        lost = lost_lse(call.meant, call.q, call.k, run.lse, exact.lse) if wgmma else 0.0
        _within(f"{name}: lse", run.lse, exact.lse, LSE_TOLERANCE + 2 * lost, f"absolute + 2 x {lost:.3e} (products of wgmma)")
    finite = np.isfinite(exact.out)
    error = np.where(finite, run.out.astype(np.float64) - exact.out, 0)
    return float(np.linalg.norm(error) / max(np.linalg.norm(np.where(finite, exact.out, 0)), 1e-30))


def lost_lse(meant: Inputs, q: Array, k: Array, got: Array, exact: Array) -> float:
    """What products of 8-bit wgmma cost the LSE at most, among heads and queries where ``got`` is off by more than its tolerance."""
    double = np.dtype(np.float64)
    lost = 0.0
    with np.errstate(all="ignore"):
        for sequence in meant.sequences():
            right = exact[sequence.lse_rows]
            heads, queries = (np.unique(x) for x in np.nonzero(np.abs(got[sequence.lse_rows] - right) > LSE_TOLERANCE))
            if len(heads):
                products = _wgmma_products(meant, q, k, sequence.index, heads, queries)
                made = _softmax(meant, sequence, heads, queries, Precision(double, double), products)
                lost = max(lost, _largest(made.lse, right[np.ix_(heads, queries)]))
    return lost
