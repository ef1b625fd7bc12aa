"""Kernels of the fake card: they decode their parameters, as a kernel would, and ask the CPU backend.

A launch fails when its parameters contradict its spec, as an aligned kernel with an odd address, or a map of memory that is not the
argument.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import numpy as np

from atomr_accel_flashattn.arrays.read import as_numpy, contiguous_strides, dtype_name_of
from atomr_accel_flashattn.kernels.attention import AttentionSpec
from atomr_accel_flashattn.kernels.backward import BackwardSpec, BwdParams
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskParams, DropoutMaskSpec
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8ForwardSpec, Fa3Fp8FwdParams
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3FwdParams
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheParams, Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.forward import ForwardSpec, FwdParams
from atomr_accel_flashattn.kernels.fp8_kvcache import (
    DescaledKvCacheParams,
    DescaledStepParams,
    Fp8KvCacheSpec,
    Fp8ScheduledKvCacheSpec,
)
from atomr_accel_flashattn.kernels.kv_append import Fp8AppendParams, Fp8AppendSpec, KvAppendParams, KvAppendSpec
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, KvCacheParams, KvCacheSpec, SplitCombineSpec
from atomr_accel_flashattn.kernels.merge_states import MergeStatesParams, MergeStatesSpec
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepCombineSpec, StepParams, StepScheduleSpec
from atomr_accel_flashattn.limits import UNBOUNDED
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem, Band, Dropout, Strides
from atomr_accel_flashattn.reference import attention
from atomr_accel_flashattn.types import Device, DType
from tests.emulator.build import run as emulate

__all__ = ["array_at", "decode", "move_map", "read_parameters", "run_kernel", "scale_as_read", "strided"]

_WARPGROUP_ROWS = 64  # of q in a box, whatever the tile
_FLAT_TENSOR = struct.Struct("<Q4q5i5ii")  # what ``tests.emulator.running.flat_tensor`` writes


def read_parameters(spec: KernelSpec, address: int) -> Any:
    """A copy of the parameters that lie there; those of the FA3 family are their ``fwd``."""
    kinds: dict[Any, Any] = {
        Fp8KvCacheSpec: DescaledKvCacheParams,
        Fp8ScheduledKvCacheSpec: DescaledStepParams,
        Fp8AppendSpec: Fp8AppendParams,
        Fa3Fp8ForwardSpec: Fa3Fp8FwdParams,
    }
    kinds |= {DropoutMaskSpec: DropoutMaskParams, BackwardSpec: BwdParams, KvAppendSpec: KvAppendParams, MergeStatesSpec: MergeStatesParams}
    kinds |= dict.fromkeys((ScheduledKvCacheSpec, StepCombineSpec, StepScheduleSpec), StepParams)
    kinds |= dict.fromkeys((Fa2KvCacheSpec, SplitCombineSpec), KvCacheParams) | {Fa3KvCacheSpec: Fa3KvCacheParams}
    kind = next((params for of, params in kinds.items() if isinstance(spec, of)), FwdParams)
    return kind.from_buffer_copy(kind.from_address(address))


def run_kernel(spec: KernelSpec, params: Any, address: int, *, grid: int, counters: int | None) -> None:
    """Check what a launch says against its spec, and compute. ``counters``: where those of its stream lie."""
    if isinstance(spec, DropoutMaskSpec):
        size = params.batch * params.heads * params.seqlen_q * params.seqlen_k
        np.frombuffer((ctypes.c_uint8 * size).from_address(params.keep), np.uint8)[:] = 1
        return
    if isinstance(spec, (Fa3KvCacheSpec, Fa3Fp8ForwardSpec)):
        assert isinstance(spec, Fa3Fp8ForwardSpec) or params.tiles % params.splits == 0
        assert grid <= params.tiles if spec.tile.persistent else grid == params.tiles
        assert not spec.tile.persistent or params.counters == counters, "a persistent kernel counts in another stream's counters"
        own = np.zeros(2, np.int32)
        params.counters = own.ctypes.data if params.counters else None
        emulate(spec, params, grid)
        assert not own.any(), "a persistent kernel must leave its counters zero"
        return
    if isinstance(spec, (KvAppendSpec, KvCacheSpec, MergeStatesSpec)):  # they have no stand-in: their own source runs
        emulate(spec, params, grid)
        return
    assert isinstance(spec, ForwardSpec)
    packed = _packed_heads(spec, params)
    tiles = -(-max(1, params.seqlen_q) * packed // spec.tile.block_m) * params.batch * (params.heads // packed)
    assert (params.work_heads, 1 << params.packed_shift) == (params.heads // packed, packed)
    if spec.family is Family.FA3:
        fa3 = Fa3FwdParams.from_buffer_copy(Fa3FwdParams.from_address(address))
        assert fa3.tiles == tiles
        assert not spec.tile.persistent or fa3.counters == counters, "a persistent kernel counts in another stream's counters"
        _check_maps(spec, fa3)
    assert grid <= tiles if spec.tile.persistent else grid == tiles
    _check_alignment(spec, params)
    problem, out, lse = decode(spec, params)
    attention.forward(problem, as_numpy(out), None if lse is None else as_numpy(lse), None)


def scale_as_read(scale: float) -> float:
    """A softmax scale as kernels read it: to base 2, in float32."""
    return ctypes.c_float(scale * math.log2(math.e)).value * math.log(2)


def move_map(tensor_map: int, ptr: int) -> int:
    """Stands in for cuTensorMapReplaceAddress, which wants maps on multiples of 64."""
    assert tensor_map % 64 == 0
    ctypes.c_uint64.from_address(tensor_map).value = ptr
    return 0


def _check_maps(spec: ForwardSpec, params: Fa3FwdParams) -> None:
    """The maps are those of the addresses, sizes and strides that the rest of the parameters tells (tests/emulator, ``flat_tensor``)."""
    p, keys = params.fwd, spec.tile.block_n
    rows_q, rows_k = (p.lse_head_stride, _rows_of(params.k_map)) if spec.varlen else (p.seqlen_q, p.seqlen_k)
    if spec.varlen:
        assert rows_k >= int(as_numpy(array_at(p.cu_seqlens_k, (p.batch + 1,), "int32"))[-1]), "a tensor map ends before the last sequence"
    heads_kv, batch = p.heads // p.heads_per_kv, 1 if spec.varlen else p.batch
    q, k, v = p.q_stride, p.k_stride, p.v_stride
    group = _packed_heads(spec, p)
    if group == 1:
        q_map = (rows_q, p.heads, batch), (q.row, q.head, q.batch), (_WARPGROUP_ROWS, 1, 1)
    else:
        q_map = (group, rows_q, heads_kv, batch), (q.head, q.row, group * q.head, q.batch), (group, _WARPGROUP_ROWS // group, 1, 1)
    kv_maps = [((rows_k, heads_kv, batch), (step.row, step.head, step.batch), (keys, 1, 1)) for step in (k, v)]
    _check_map(spec, params.q_map, p.q, (p.head_dim, spec.head_dim), *q_map)
    _check_map(spec, params.k_map, p.k, (p.head_dim, spec.head_dim), *kv_maps[0])
    _check_map(spec, params.v_map, p.v, (p.v_head_dim, spec.v_head_dim), *kv_maps[1])


def _rows_of(tensor_map: Any) -> int:
    """Rows that a map of k has: only the host knows how many there are past the last sequence."""
    return int(_FLAT_TENSOR.unpack(bytes(tensor_map.bytes)[: _FLAT_TENSOR.size])[6])


def _check_map(
    spec: ForwardSpec,
    tensor_map: Any,
    ptr: int,
    widths: tuple[int, int],
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    box: tuple[int, ...],
) -> None:
    """One map; ``sizes``, ``steps`` and ``box`` are those of the dimensions after the columns, steps in elements."""
    columns, width = widths
    address, *numbers = _FLAT_TENSOR.unpack(bytes(tensor_map.bytes)[: _FLAT_TENSOR.size])
    strides, made_sizes, made_box, rank = numbers[:4], numbers[4:9], numbers[9:14], numbers[14]
    more = (1,) * (5 - rank)
    assert rank == 1 + len(sizes)
    if columns and all(sizes):
        assert address == ptr, "a tensor map reads from another address than the argument's"
    assert made_sizes == [columns, *(max(1, size) for size in sizes), *more]
    for size, made, step in zip(sizes, strides, steps, strict=False):
        assert size <= 1 or made == step * spec.dtype.itemsize
    assert made_box == [64 if width % 64 == 0 else 32, *box, *more]


def _packed_heads(spec: ForwardSpec, params: FwdParams) -> int:
    """Query heads whose rows one tile mixes."""
    return int(params.heads_per_kv) if spec.pack_gqa else 1


def _check_alignment(spec: ForwardSpec, params: FwdParams) -> None:
    if spec.aligned:
        assert not ((params.q or 0) | (params.k or 0) | (params.v or 0) | (params.o or 0)) & 15, (
            "an aligned kernel was given an odd address"
        )
        for name in ("q_stride", "k_stride", "v_stride"):
            strides = getattr(params, name)
            assert not (strides.batch | strides.row | strides.head) * spec.dtype.itemsize & 15, f"an aligned kernel was given an odd {name}"
        taken = [step for step, size in ((params.o_stride.row, params.seqlen_q), (params.o_stride.head, params.heads)) if size > 1]
        assert not any(step * spec.dtype.itemsize & 15 for step in taken), "an aligned kernel was given an odd o_stride"
    assert spec.exact_head_dim == ((spec.head_dim, spec.v_head_dim) == (params.head_dim, params.v_head_dim))


def decode(spec: AttentionSpec, p: FwdParams) -> tuple[AttentionProblem, ArrayInfo, ArrayInfo | None]:
    """The problem that the kernel sees: numbers count only where the spec has the feature."""
    heads_kv = p.heads // p.heads_per_kv
    offsets = [None, None]
    lead_q, lead_k = (p.batch, p.seqlen_q), (p.batch, p.seqlen_k)
    if spec.varlen:
        offsets = [array_at(ptr, (p.batch + 1,), "int32") for ptr in (p.cu_seqlens_q, p.cu_seqlens_k)]
        lead_q, lead_k = (p.lse_head_stride,), (int(as_numpy(offsets[1])[-1]),)  # of q all rows, owned or not
    q = strided(spec, p.q, p.q_stride, (*lead_q, p.heads, p.head_dim))
    k = strided(spec, p.k, p.k_stride, (*lead_k, heads_kv, p.head_dim))
    v = strided(spec, p.v, p.v_stride, (*lead_k, heads_kv, p.v_head_dim))
    out = strided(spec, p.o, p.o_stride, (*lead_q, p.heads, p.v_head_dim))
    lse_shape = (p.heads, lead_q[0]) if spec.varlen else (p.batch, p.heads, p.seqlen_q)
    scale = p.scale_log2 * math.log(2)
    slopes_shape = (p.batch, p.heads) if p.alibi_batch_stride else (p.heads,)
    slopes_strides = (p.alibi_batch_stride, 1)[-len(slopes_shape) :]
    assert spec.scale_first == (scale <= 0)
    problem = AttentionProblem(
        q=q,
        k=k,
        v=v,
        q_strides=Strides(p.q_stride.batch, p.q_stride.row, p.q_stride.head),
        k_strides=Strides(p.k_stride.batch, p.k_stride.row, p.k_stride.head),
        v_strides=Strides(p.v_stride.batch, p.v_stride.row, p.v_stride.head),
        batch=p.batch,
        heads=p.heads,
        heads_kv=heads_kv,
        seqlen_q=p.seqlen_q,
        seqlen_k=p.seqlen_k,
        head_dim=p.head_dim,
        v_head_dim=p.v_head_dim,
        softmax_scale=scale,
        band=Band(_bound(p.window_left) if spec.left_bound else None, _bound(p.window_right) if spec.right_bound else None, p.sink_tokens),
        softcap=p.softcap_log2 * math.log(2) if spec.softcap else 0.0,
        alibi_slopes=array_at(p.alibi_slopes, slopes_shape, "float32", slopes_strides) if spec.alibi else None,
        learned_sink=array_at(p.learned_sink, (p.heads,), "float32") if spec.learned_sink else None,
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        dropout=Dropout(1 - p.dropout_threshold / 256, array_at(p.rng, (2,), "int64")) if spec.dropout else None,
    )
    return problem, out, array_at(p.lse, lse_shape, "float32") if p.lse else None


def _bound(side: int) -> int | None:
    return None if side >= UNBOUNDED else side


def strided(spec: AttentionSpec, ptr: int | None, strides: Any, shape: tuple[int, ...]) -> ArrayInfo:
    """An array of tokens, heads and columns, as parameters tell of it."""
    lead = () if spec.varlen else (strides.batch,)
    name = dtype_name_of(spec.dtype)
    return ArrayInfo(ptr or 0, shape, (*lead, strides.row, strides.head, 1), spec.dtype, name, Device("cpu", 0), None)


def array_at(ptr: int, shape: tuple[int, ...], name: str, strides: tuple[int, ...] | None = None) -> ArrayInfo:
    """An array of another type than the call's, row-major where no strides are told."""
    dtype = DType.F32 if name == "float32" else None
    return ArrayInfo(ptr, shape, strides or contiguous_strides(shape), dtype, name, Device("cpu", 0), None)
