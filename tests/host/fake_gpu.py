"""A GPU made of host memory: torch tensors that say they are on cuda, and kernels that decode their parameters and ask the CPU backend.

So everything above the driver runs as on a card: dispatch, packing, plans, pointers. A launch fails when its parameters contradict its
spec, as an aligned kernel with an odd address.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from atomr_accel_flashattn.arrays import as_numpy, contiguous_strides, dtype_name_of
from atomr_accel_flashattn.jit.params import UNBOUNDED, DropoutMaskParams, FwdParams
from atomr_accel_flashattn.jit.spec import KernelSpec
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem, Band, Dropout, Strides
from atomr_accel_flashattn.reference import attention
from atomr_accel_flashattn.types import Device, DType

STREAM = 77


class FakeCuda(torch.Tensor):
    """Host memory that says it is on ``cuda:0`` (or on the device in ``index``)."""

    index = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return self.index


def fake(tensor: torch.Tensor) -> FakeCuda:
    """The same memory, on the fake card."""
    return tensor.as_subclass(FakeCuda)


@dataclass
class FakeGpu:
    """What was launched: (spec, parameters, stream, whether a plan repeated it)."""

    launches: list[tuple[KernelSpec, Any, int, bool]] = field(default_factory=list)

    @property
    def last(self) -> Any:
        """Parameters of the last launch."""
        return self.launches[-1][1]

    @property
    def planned(self) -> list[bool]:
        """For each launch, whether a plan made it."""
        return [launch[3] for launch in self.launches]

    def load(self, spec: KernelSpec, device_index: int) -> FakeKernel:
        """Stands in for ``load_kernel``."""
        return FakeKernel(self, spec, device_index)

    def launch(self, kernel: FakeKernel, grid: int, params: Any, stream: int, *, planned: bool = False) -> None:
        """Stands in for ``launch``."""
        spec = kernel.spec
        self.launches.append((spec, params, stream, planned))
        if isinstance(params, DropoutMaskParams):
            np.frombuffer((ctypes.c_uint8 * _mask_size(params)).from_address(params.keep), np.uint8)[:] = 1
            return
        assert grid == -(-params.seqlen_q // spec.tile.block_m) * params.batch * params.heads
        _check_alignment(spec, params)
        problem, out, lse = _decode(spec, params)
        attention.forward(problem, as_numpy(out), None if lse is None else as_numpy(lse), None)


@dataclass
class FakeKernel:
    """Stands in for a LoadedKernel."""

    gpu: FakeGpu
    spec: KernelSpec
    device_index: int

    def plan(self, params: FwdParams, grid: int, maps: tuple[Any, ...] = ()) -> FakePlan:  # noqa: ARG002 - the FA3 family has them
        return FakePlan(self, FwdParams.from_buffer_copy(params), grid)


@dataclass
class FakePlan:
    """Stands in for a LaunchPlan."""

    kernel: FakeKernel
    params: FwdParams
    grid: int

    def launch(self, stream: int, pointers: tuple[int, ...]) -> None:
        params = FwdParams.from_buffer_copy(self.params)
        (ctypes.c_uint64 * params.POINTERS).from_buffer(params)[:] = pointers
        self.kernel.gpu.launch(self.kernel, self.grid, params, stream, planned=True)


def _mask_size(params: DropoutMaskParams) -> int:
    return int(params.batch * params.heads * params.seqlen_q * params.seqlen_k)


def _check_alignment(spec: KernelSpec, params: FwdParams) -> None:
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


def _decode(spec: KernelSpec, p: FwdParams) -> tuple[AttentionProblem, ArrayInfo, ArrayInfo | None]:
    """The problem that the kernel sees: numbers count only where the spec has the feature."""
    heads_kv = p.heads // p.heads_per_kv
    offsets = [None, None]
    lead_q, lead_k = (p.batch, p.seqlen_q), (p.batch, p.seqlen_k)
    if spec.varlen:
        offsets = [_at(ptr, (p.batch + 1,), "int32") for ptr in (p.cu_seqlens_q, p.cu_seqlens_k)]
        lead_q, lead_k = ((int(as_numpy(array)[-1]),) for array in offsets)
    q = _strided(spec, p.q, p.q_stride, (*lead_q, p.heads, p.head_dim))
    k = _strided(spec, p.k, p.k_stride, (*lead_k, heads_kv, p.head_dim))
    v = _strided(spec, p.v, p.v_stride, (*lead_k, heads_kv, p.v_head_dim))
    out = _strided(spec, p.o, p.o_stride, (*lead_q, p.heads, p.v_head_dim))
    lse_shape = (p.heads, lead_q[0]) if spec.varlen else (p.batch, p.heads, p.seqlen_q)
    scale = p.scale_log2 * math.log(2)
    slopes_shape = (p.batch, p.heads) if p.alibi_batch_stride else (p.heads,)
    slopes_strides = (p.alibi_batch_stride, 1)[-len(slopes_shape) :]
    assert spec.prescale == (scale <= 0)
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
        alibi_slopes=_at(p.alibi_slopes, slopes_shape, "float32", slopes_strides) if spec.alibi else None,
        learned_sink=_at(p.learned_sink, (p.heads,), "float32") if spec.learned_sink else None,
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        dropout=Dropout(1 - p.dropout_threshold / 256, _at(p.rng, (2,), "int64")) if spec.dropout else None,
    )
    return problem, out, _at(p.lse, lse_shape, "float32") if p.lse else None


def _bound(side: int) -> int | None:
    return None if side >= UNBOUNDED else side


def _strided(spec: KernelSpec, ptr: int, strides: Any, shape: tuple[int, ...]) -> ArrayInfo:
    lead = () if spec.varlen else (strides.batch,)
    name = dtype_name_of(spec.dtype)
    return ArrayInfo(ptr or 0, shape, (*lead, strides.row, strides.head, 1), spec.dtype, name, Device("cpu", 0), None)


def _at(ptr: int, shape: tuple[int, ...], name: str, strides: tuple[int, ...] | None = None) -> ArrayInfo:
    dtype = DType.F32 if name == "float32" else None
    return ArrayInfo(ptr, shape, strides or contiguous_strides(shape), dtype, name, Device("cpu", 0), None)
