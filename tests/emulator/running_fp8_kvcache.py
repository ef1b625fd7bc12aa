"""The kernels over a cache of fp8 K and V on the emulator, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.kernels.fa3_fp8 import fp8_width
from atomr_accel_flashattn.kernels.fa3_fp8_kvcache import Fa3Fp8KvCacheSpec
from atomr_accel_flashattn.kernels.fp8_kvcache import Fp8KvCacheSpec, Fp8ScheduledKvCacheSpec
from atomr_accel_flashattn.kernels.kvcache import KvCacheSpec
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.problem import Descale, Descales, Strides
from atomr_accel_flashattn.types import DType, ScaleUnit
from tests.cases import Case, build
from tests.check import _same_pattern, _within
from tests.fp8 import lost_lse
from tests.inputs import NUMPY_DTYPE, Inputs, place
from tests.oracle import LSE_TOLERANCE, Precision, Tolerance, _softmax, oracle

from .running_kvcache import Cached

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from atomr_accel_flashattn.problem import AttentionProblem
    from tests.check import Run

    Array = NDArray[Any]

__all__ = ["Fp8", "average_of_ones", "check_fp8"]

FP8 = {DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn), DType.F8E5M2: np.dtype(ml_dtypes.float8_e5m2)}
_TOKENS = 128  # that share a descale
_ODD = (0, -1, 0.25, -3, 2, 2.0**-40)


@dataclass(frozen=True)
class Fp8:
    """Types and descales of a call. ``q`` None: of the case. Units are those of q, k and v; None is no descale.

    ``products``: mma.sync multiplies q and k in 8 bits. ``odd``: descales of 0, negative ones, and some 2^40 apart, side by side.
    """

    q: DType | None = None
    k: DType = DType.F8E4M3
    v: DType = DType.F8E4M3
    out: DType | None = None
    units: tuple[ScaleUnit | None, ...] = (None, None, None)
    odd: bool = False
    products: bool = False

    def __str__(self) -> str:
        types = [each.value for each in (self.q, self.k, self.v, self.out) if each]
        return "-".join([*types, *(unit.value if unit else "none" for unit in self.units), *(["products"] if self.products else [])])


@dataclass(frozen=True)
class _Call:
    """What is given to a kernel, and its values: descales of each token of q, k and v, by KV head."""

    given: Inputs
    exact: Inputs
    descales: dict[str, tuple[ScaleUnit, Array]]


@dataclass(frozen=True)
class _Fp8Cached(Cached):
    """``Cached`` with the types and descales of ``call``."""

    fp8: Fp8 = Fp8()
    call: Any = None

    def problem(self, inputs: Inputs) -> AttentionProblem:
        described = {name: self._described(*each) for name, each in self.call.descales.items()}
        q = inputs.q.dtype
        out = self.fp8.out or (DType.BF16 if q in FP8.values() else next(dtype for dtype, kind in NUMPY_DTYPE.items() if kind == q))
        return replace(Cached.problem(self, inputs), descales=Descales(**described), out_dtype=out)

    def spec_of(self, **fields: Any) -> KvCacheSpec:
        units = {name: unit for name, (unit, _) in self.call.descales.items()}
        tokens = {f"{name}_token_scales": units.get(name) is ScaleUnit.TOKEN for name in "kv"}
        types = {"k_dtype": self.fp8.k, "v_dtype": self.fp8.v, "out_dtype": None}
        problem = self.problem(self.call.given)
        types["out_dtype"] = problem.out_dtype
        fields = fields | types
        if self.family is Family.FA3:
            widths = (fp8_width(problem.head_dim), fp8_width(problem.v_head_dim))
            fields |= {"head_dim": widths[0], "v_head_dim": widths[1]}
            fields |= {"exact_head_dim": widths == (problem.head_dim, problem.v_head_dim)}
            return Fa3Fp8KvCacheSpec(split=self.splits > 1, block_descales=ScaleUnit.BLOCK in units.values(), **fields)
        fields |= tokens | {"fp8_products": self.fp8.products}
        if self.blocks:
            return Fp8ScheduledKvCacheSpec(**fields)
        return Fp8KvCacheSpec(split=self.splits > 1, **fields)

    def more_arrays(self, held: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, (unit, values) in self.call.descales.items():
            found[f"{name}_descale"] = self._paged(values, held) if unit is ScaleUnit.TOKEN else values
        return found

    def _paged(self, values: Array, held: dict[str, Any]) -> Array:
        """Descales of tokens where their tokens lie; NaN beside."""
        assert self.block_size is not None
        paged = np.full((*held["k"].shape[:2], values.shape[-1]), np.nan, np.float32)
        for index, sequence in enumerate(self.call.given.sequences()):
            start = 0 if self.call.given.cu_seqlens_k is None else int(self.call.given.cu_seqlens_k[index])
            for j in range(len(sequence.k)):
                paged[held["blocks"][index, j // self.block_size], j % self.block_size] = values[start + j]
        return paged

    def _described(self, unit: ScaleUnit, values: Array) -> Descale:
        if unit is ScaleUnit.TOKEN:
            heads = values.shape[-1]
            return Descale(read_array(values, "descale"), unit, Strides(self.block_size * heads, heads, 1))
        steps = {ScaleUnit.TENSOR: (), ScaleUnit.HEAD: values.shape, ScaleUnit.BLOCK: values.shape}[unit]
        strides = [step // 4 for step in values.strides]
        batch, head, row = [*strides, 0, 0, 0][:3] if steps else (0, 0, 0)
        return Descale(read_array(values, "descale"), unit, Strides(batch, row, head))


def check_fp8(case: Case, fp8: Fp8, way: Cached) -> None:
    """The kernel is as near to the exact attention over dequantised arrays as one that rounds P to the same type."""
    call = _quantised(case, fp8)
    run = _run(call, fp8, way)
    if way.holes:
        call = replace(call, exact=way.hide_holes(call.exact))
    _compare(f"{case} {fp8}", call, fp8, run, wgmma=way.family is Family.FA3 and not way.holes)


def average_of_ones(case: Case, fp8: Fp8, way: Cached) -> Array:
    """O of the kernel where V is 1."""
    call = _quantised(case, fp8)
    call.given.v[...] = 1
    return _run(call, fp8, way).out


def _run(call: _Call, fp8: Fp8, way: Cached) -> Run:
    return _Fp8Cached(**{name: getattr(way, name) for name in Cached.__dataclass_fields__}, fp8=fp8, call=call)(call.given)


def _compare(name: str, call: _Call, fp8: Fp8, made: Run, *, wgmma: bool) -> None:
    exact, plain = oracle(call.exact), _plain(call, fp8, made.out.dtype)
    out = next(dtype for dtype, kind in NUMPY_DTYPE.items() if kind == made.out.dtype)
    tolerance = Tolerance.of_output(out, exact.out, [plain])
    with np.errstate(over="ignore"):
        _same_pattern(f"{name}: out", made.out, exact.out.astype(made.out.dtype))
    origin = f"2 x {tolerance.plain_error:.3e} (plain evaluation) + {tolerance.floor:.3e}"
    _within(f"{name}: out", made.out, exact.out, tolerance.bound, origin)
    assert made.lse is not None
    _same_pattern(f"{name}: lse", made.lse, exact.lse)
    lost = lost_lse(call.exact, call.given.q, call.given.k, made.lse, exact.lse) if wgmma else 0.0
    _within(f"{name}: lse", made.lse, exact.lse, LSE_TOLERANCE + 2 * lost, f"absolute + 2 x {lost:.3e} (products of wgmma)")


def _plain(call: _Call, fp8: Fp8, out: np.dtype[Any]) -> Array:
    """P is rounded to the type of v, or of a 16-bit q, after it was scaled so that its largest is 256."""
    inputs, rounded = call.exact, FP8[fp8.v] if fp8.q else call.given.q.dtype
    single = np.dtype(np.float32)
    result = np.zeros(inputs.out_shape, single)
    for sequence in inputs.sequences():
        heads, queries = np.arange(inputs.heads), np.arange(len(sequence.q))
        with np.errstate(all="ignore"):
            p = _softmax(inputs, sequence, heads, queries, Precision(single, single)).probability
        top = p.max(axis=-1, initial=0, keepdims=True)
        kv_heads = heads // (inputs.heads // inputs.heads_kv)
        scaled = np.where(top > 0, p / np.where(top > 0, top, 1), 0) * 256
        back = scaled.astype(rounded).astype(single) / 256 * top
        v = np.where(np.isfinite(sequence.v), sequence.v, 0)[:, kv_heads].transpose(1, 0, 2).astype(single)
        result[sequence.out_rows] = (back @ v).transpose(1, 0, 2)
    return result.astype(out)


def _quantised(case: Case, fp8: Fp8) -> _Call:
    base = build(case)
    random = np.random.default_rng(5)
    kinds = {"q": FP8[fp8.q] if fp8.q else base.q.dtype, "k": FP8[fp8.k], "v": FP8[fp8.v]}
    given: dict[str, Array] = {}
    exact: dict[str, Array] = {}
    descales: dict[str, tuple[ScaleUnit, Array]] = {}
    for name, unit in zip("qkv", fp8.units, strict=True):
        array = getattr(base, name)
        low = array.astype(np.float32).astype(kinds[name])
        values, of_token = _descale(random, unit, base, name, odd=fp8.odd)
        if unit is not None:
            descales[name] = (unit, values)
        given[name] = place(low, case.layout)
        heads = array.shape[-2]
        of_head = of_token[..., np.arange(heads) // (heads // base.heads_kv)] if name == "q" else of_token
        exact[name] = low.astype(np.float64) * of_head[..., None]
    wide = replace(base, dtype=DType.F32, **exact)
    return _Call(replace(base, **given), wide, descales)


def _descale(random: np.random.Generator, unit: ScaleUnit | None, inputs: Inputs, name: str, *, odd: bool) -> tuple[Array, Array]:
    """A descale, and that of each row (the shape of q, k or v without heads and columns, and KV heads)."""
    array = getattr(inputs, name)
    lead, heads, batch = array.shape[:-2], inputs.heads_kv, inputs.batch
    longest = inputs.max_seqlen_q if name == "q" else inputs.max_seqlen_k
    blocks = -(-longest // _TOKENS)
    shape = {None: (), ScaleUnit.TENSOR: (), ScaleUnit.HEAD: (batch, heads), ScaleUnit.BLOCK: (batch, heads, blocks)}.get(unit)
    if shape is None:
        values = random.choice(np.array(_ODD if odd else [0.25, 0.5, 0.7, 1, 3], np.float32), (*lead, heads))
        return values, values
    values = (
        np.asarray(random.choice(_ODD, shape) if odd else random.uniform(0.3, 3, shape), np.float32) if unit else np.ones((), np.float32)
    )
    of_token = np.ones((*lead, heads), np.float32)
    for sequence in inputs.sequences():
        rows = sequence.out_rows if name == "q" else _rows_of_keys(inputs, sequence.index)
        count = len(sequence.q if name == "q" else sequence.k)
        if values.ndim == 3:
            of_token[rows] = values[sequence.index][:, np.arange(count) // _TOKENS].T
        else:
            of_token[rows] = values[sequence.index] if values.ndim else values
    return values, of_token


def _rows_of_keys(inputs: Inputs, index: int) -> tuple[int | slice, ...]:
    if inputs.cu_seqlens_k is None:
        return (index,)
    return (slice(int(inputs.cu_seqlens_k[index]), int(inputs.cu_seqlens_k[index + 1])),)
