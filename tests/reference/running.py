"""Run the CPU backend directly on the inputs of a case, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem, BackwardProblem, Band, Dropout, Strides
from atomr_accel_flashattn.reference import forward
from atomr_accel_flashattn.reference.backward import backward
from tests.check import Run
from tests.inputs import NUMPY_DTYPE, Inputs, Layout, Poisoned
from tests.oracle import Gradients, Upstream

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["backward_problem_of", "problem_of", "run_backward", "run_reference"]


def problem_of(inputs: Inputs) -> AttentionProblem:
    """The normal form of a call, as a request would make it."""
    q, k, v = (read_array(array, name) for array, name in ((inputs.q, "q"), (inputs.k, "k"), (inputs.v, "v")))
    return AttentionProblem(
        q=q,
        k=k,
        v=v,
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        batch=inputs.batch,
        heads=inputs.heads,
        heads_kv=inputs.heads_kv,
        seqlen_q=inputs.max_seqlen_q,
        seqlen_k=inputs.max_seqlen_k,
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        softmax_scale=inputs.softmax_scale,
        band=Band(inputs.left, inputs.right, inputs.sink_tokens),
        softcap=inputs.softcap,
        alibi_slopes=_optional(inputs.alibi_slopes, "alibi_slopes"),
        learned_sink=_optional(inputs.learned_sink, "learned_sink"),
        cu_seqlens_q=_optional(inputs.cu_seqlens_q, "cu_seqlens_q"),
        cu_seqlens_k=_optional(inputs.cu_seqlens_k, "cu_seqlens_k"),
        dropout=None if inputs.rng is None else Dropout(inputs.dropout_p, read_array(inputs.rng, "rng")),
    )


def run_reference(inputs: Inputs, layout: Layout = Layout.PADDED) -> Run:
    """Outputs start as NaN, lie inside guarded memory, and the inputs must come back unchanged."""
    before = [array.tobytes() for array in (inputs.q, inputs.k, inputs.v)]
    out = Poisoned.empty(inputs.out_shape, NUMPY_DTYPE[inputs.dtype], layout)
    lse = np.full(inputs.lse_shape, np.nan, np.float32)
    keep = np.ones(inputs.keep_shape, np.bool_) if inputs.dropout_p else None
    forward(problem_of(inputs), out.view, lse, keep)
    out.check()
    assert before == [array.tobytes() for array in (inputs.q, inputs.k, inputs.v)], "an input was changed"
    return Run(out.view, lse, keep)


def backward_problem_of(inputs: Inputs, upstream: Upstream, *, recompute: bool = False) -> BackwardProblem:
    """The normal form of a backward call, with o and the LSE of a forward that runs now unless ``recompute``."""
    problem, out, lse = problem_of(inputs), None, None
    if not recompute:
        out, lse = np.zeros(inputs.out_shape, NUMPY_DTYPE[inputs.dtype]), np.full(inputs.lse_shape, -np.inf, np.float32)
        forward(problem, out, lse, None)
    return BackwardProblem(
        forward=problem,
        out=_optional(out, "out"),
        lse=_optional(lse, "lse"),
        dout=_optional(upstream.dout, "dout"),
        dlse=_optional(upstream.dlse, "dlse"),
    )


def run_backward(inputs: Inputs, upstream: Upstream, layout: Layout = Layout.PADDED, *, recompute: bool = False) -> Gradients:
    """Gradients start as NaN and lie inside guarded memory; nothing else may change."""
    given = [array for array in (inputs.q, inputs.k, inputs.v, upstream.dout, upstream.dlse) if array is not None]
    before = [array.tobytes() for array in given]
    made = [Poisoned.empty(array.shape, NUMPY_DTYPE[inputs.dtype], layout) for array in (inputs.q, inputs.k, inputs.v)]
    dsink = None if inputs.learned_sink is None else np.full(inputs.heads, np.nan, np.float32)
    dq, dk, dv = (each.view for each in made)
    backward(backward_problem_of(inputs, upstream, recompute=recompute), dq, dk, dv, dsink)
    for each in made:
        each.check()
    assert before == [array.tobytes() for array in given], "an input was changed"
    return Gradients(dq, dk, dv, dsink)


def _strides(info: ArrayInfo) -> Strides:
    batch = info.strides[0] if len(info.shape) == 4 else 0
    return Strides(batch, info.strides[-3], info.strides[-2])


def _optional(array: NDArray[Any] | None, name: str) -> ArrayInfo | None:
    return None if array is None else read_array(array, name)
