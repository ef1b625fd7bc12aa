"""Judge a run against the oracle: NaN and infinity first, then the worst element with its index, bound and origin of the bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from atomr_accel_flashattn.types import DType

from .cases import build
from .inputs import NUMPY_DTYPE
from .oracle import (
    LSE_TOLERANCE,
    Gradients,
    Rows,
    Tolerance,
    cancellation_floor,
    keep_pattern,
    oracle,
    oracle_gradients,
    same_dtype,
    same_dtype_gradients,
    sample_rows,
)
from .upstream import build_upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .cases import Case
    from .inputs import Inputs
    from .oracle import Upstream

    Array = NDArray[Any]

__all__ = ["Report", "Run", "check_arrays", "check_case", "check_gradient_arrays", "check_gradients"]

SAMPLE_ABOVE = 1 << 25  # score elements; above, 64 sampled rows are judged
GRADIENT_FACTOR = 3.0  # of the error of the plain evaluation


class Run(NamedTuple):
    """What the code under test returned, as NumPy arrays; `lse` and `keep` are None where they were not asked for."""

    out: Array
    lse: Array | None = None
    keep: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of a case that passed. `ratio` is the error over the error of the plain evaluation in the same type."""

    case: str
    error: float
    plain_error: float
    bound: float
    lse_error: float

    @property
    def ratio(self) -> float:
        """Error relative to the plain evaluation; 0 where that one is exact."""
        return self.error / self.plain_error if self.plain_error else 0.0


def check_case(case: Case, run: Callable[[Inputs], Run | tuple[Array, Array | None, NDArray[np.bool_] | None]]) -> Report:
    """Build the inputs of a case, run it, and compare with the oracle; raises AssertionError with the worst element.

    ``run`` gets :class:`tests.inputs.Inputs` and returns (out, lse, keep) in NumPy, shaped as ``out_shape``, ``lse_shape`` and
    ``keep_shape``. It should fill outputs with NaN before it runs (:class:`tests.inputs.Poisoned`).
    """
    inputs = build(case)
    rows = sample_rows(inputs) if case.score_count > SAMPLE_ABOVE else None
    return check_arrays(str(case), inputs, Run(*run(inputs)), rows)


def check_arrays(name: str, inputs: Inputs, run: Run, rows: Rows | None = None) -> Report:
    """Compare one run with the oracle, on all rows or on sampled ones."""
    kind = NUMPY_DTYPE[inputs.dtype]
    assert run.out.shape == inputs.out_shape, f"{name}: out has shape {run.out.shape}, expected {inputs.out_shape}"
    assert run.out.dtype == kind, f"{name}: out has type {run.out.dtype}, expected {kind}"
    exact, plain = oracle(inputs, rows), same_dtype(inputs, rows)
    tolerance = Tolerance.of_output(inputs.dtype, exact.out, [each.out for each in plain])
    out = run.out if rows is None else _rows_of_out(inputs, run.out, rows)
    with np.errstate(over="ignore"):
        rounded = exact.out.astype(kind)
    _same_pattern(f"{name}: out", out, rounded)
    origin = f"2 x {tolerance.plain_error:.3e} (plain evaluation) + {tolerance.floor:.3e} (rounding floor)"
    error = _within(f"{name}: out", out, exact.out, tolerance.bound, origin)
    lse_error = 0.0
    if run.lse is not None:
        assert run.lse.shape == inputs.lse_shape, f"{name}: lse has shape {run.lse.shape}, expected {inputs.lse_shape}"
        assert run.lse.dtype == np.float32, f"{name}: lse has type {run.lse.dtype}, expected float32"
        lse = run.lse if rows is None else _rows_of_lse(inputs, run.lse, rows)
        _same_pattern(f"{name}: lse", lse, exact.lse)
        lse_error = _within(f"{name}: lse", lse, exact.lse, LSE_TOLERANCE, "absolute")
    if run.keep is not None:
        _check_keep(name, inputs, run.keep, rows)
    return Report(name, error, tolerance.plain_error, tolerance.bound, lse_error)


def check_gradients(case: Case, run: Callable[[Inputs, Upstream], Gradients | tuple[Array, Array, Array, Array | None]]) -> list[Report]:
    """Build the inputs of a case and what comes down to it, run its backward, and compare with the oracle.

    ``run`` returns (dq, dk, dv, dsink) in NumPy, shaped as q, k, v and the learned sink.
    """
    inputs = build(case)
    upstream = build_upstream(case, inputs)
    return check_gradient_arrays(str(case), inputs, upstream, Gradients(*run(inputs, upstream)))


def check_gradient_arrays(name: str, inputs: Inputs, upstream: Upstream, run: Gradients) -> list[Report]:
    """Compare the gradients of one call with the oracle, each with a bound of its own."""
    exact, plain = oracle_gradients(inputs, upstream), same_dtype_gradients(inputs, upstream)
    floors: tuple[float, ...] | None = None
    reports = []
    for index, (field, like) in enumerate(zip(exact._fields, (inputs.q, inputs.k, inputs.v, inputs.learned_sink), strict=True)):
        got, expected = run[index], exact[index]
        assert (got is None) == (expected is None), f"{name}: {field} is {got}, the oracle's is {expected}"
        if got is None or like is None:
            continue
        assert got.shape == like.shape, f"{name}: {field} has shape {got.shape}, expected {like.shape}"
        assert got.dtype == like.dtype, f"{name}: {field} has type {got.dtype}, expected {like.dtype}"
        dtype = DType.F32 if field == "dsink" else inputs.dtype
        tolerance = Tolerance.of_output(dtype, expected, [each[index] for each in plain], GRADIENT_FACTOR)
        with np.errstate(over="ignore"):
            rounded = expected.astype(like.dtype)
        _same_pattern(f"{name}: {field}", got, rounded)
        bound, floor = tolerance.bound, tolerance.floor
        if _largest(got, expected) > bound:  # seldom: where plain evaluations are right by luck
            floors = floors or cancellation_floor(inputs, upstream)
            bound, floor = bound + floors[index], floor + floors[index]
        origin = f"{GRADIENT_FACTOR:g} x {tolerance.plain_error:.3e} (plain evaluation) + {floor:.3e} (floor)"
        error = _within(f"{name}: {field}", got, expected, bound, origin)
        reports.append(Report(f"{name}: {field}", error, tolerance.plain_error, bound, 0.0))
    return reports


def _largest(got: Array, exact: Array) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(exact.dtype) - exact)
    return float(error[np.isfinite(error)].max(initial=0))


def _same_pattern(name: str, got: Array, expected: Array) -> None:
    """NaN, +inf and -inf in the same places."""
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        have, want = test(got.astype(np.float64)), test(expected.astype(np.float64))
        wrong = np.argwhere(have != want)
        assert len(wrong) == 0, (
            f"{name}: {what} in {have.sum()} elements, expected in {want.sum()}; {len(wrong)} differ, "
            f"the first at {tuple(wrong[0].tolist())}: got {got[tuple(wrong[0])]}, oracle {expected[tuple(wrong[0])]}"
        )


def _within(name: str, got: Array, exact: Array, bound: float, origin: str) -> float:
    """Largest finite |got - exact|; fails above the bound."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(exact.dtype) - exact)
    error = np.where(np.isfinite(error), error, 0)
    if error.size == 0:
        return 0.0
    worst = np.unravel_index(int(error.argmax()), error.shape)
    largest = float(error[worst])
    assert largest <= bound, (
        f"{name}: worst element {tuple(int(i) for i in worst)}: got {got[worst]}, oracle {exact[worst]}, "
        f"error {largest:.3e} > {bound:.3e} = {origin}; "
        f"{int((error > bound).sum())} of {error.size} elements are out of bounds, mean error {float(error.mean()):.3e}"
    )
    return largest


def _check_keep(name: str, inputs: Inputs, keep: NDArray[np.bool_], rows: Rows | None) -> None:
    """The dropout pattern, bit for bit; False outside each sequence."""
    assert keep.shape == inputs.keep_shape, f"{name}: keep has shape {keep.shape}, expected {inputs.keep_shape}"
    assert keep.dtype == np.bool_, f"{name}: keep has type {keep.dtype}, expected bool"
    if rows is not None:
        for index, head, query in zip(*rows, strict=True):
            key = np.arange(len(inputs.sequence(int(index)).k))
            expected = keep_pattern(inputs, int(index), np.array([head]), np.array([query]), key)[0, 0]
            keys = np.flatnonzero(keep[index, head, query, : len(key)] != expected)
            assert len(keys) == 0, f"{name}: keep[{index}, {head}, {query}] differs in {len(keys)} keys, the first is {keys[0]}"
        return
    expected = np.zeros(inputs.keep_shape, np.bool_)
    for sequence in inputs.sequences():
        query, key = np.arange(len(sequence.q)), np.arange(len(sequence.k))
        pattern = keep_pattern(inputs, sequence.index, np.arange(inputs.heads), query, key)
        expected[sequence.index, :, : len(query), : len(key)] = pattern
    wrong = np.argwhere(keep != expected)
    assert len(wrong) == 0, f"{name}: keep differs in {len(wrong)} of {keep.size} elements, the first at {tuple(wrong[0].tolist())}"


def _rows_of_out(inputs: Inputs, out: Array, rows: Rows) -> Array:
    """Sampled rows of o, (n, Dv)."""
    if inputs.cu_seqlens_q is None:
        return out[rows.sequence, rows.query, rows.head]
    return out[inputs.cu_seqlens_q[rows.sequence] + rows.query, rows.head]


def _rows_of_lse(inputs: Inputs, lse: Array, rows: Rows) -> Array:
    """Sampled rows of the LSE, (n,)."""
    if inputs.cu_seqlens_q is None:
        return lse[rows.sequence, rows.head, rows.query]
    return lse[rows.head, inputs.cu_seqlens_q[rows.sequence] + rows.query]
