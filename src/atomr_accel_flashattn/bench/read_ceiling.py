"""How fast this card reads memory: a kernel that only reads, which is what attention of one query over a long cache comes down to."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from ..dispatch import best_arch
from ..jit.compile import compile_kernel
from ..kernels.params import KernelParams
from ..kernels.spec import Family, KernelSpec
from ..launch.driver import current_context
from ..launch.launcher import _load_module
from ..problem import ArrayInfo, AttentionProblem
from ..types import Device
from .timing import Contestant, measure_in_turns

if TYPE_CHECKING:
    import torch

__all__ = ["read_ceiling"]

READ_BYTES: Final = 1 << 32
_THREADS: Final = 256
_VECTORS: Final = 8  # of 16 bytes that a thread has under way
_BLOCKS: Final = 4  # per SM, which 256 threads and at most 64 registers allow

# The sum is compared with a number that it is not, so that no load is left out and nothing is written.
_SOURCE: Final = """\
struct Params {{
  unsigned* out;
  const uint4* x;
  long long n;
}};

extern "C" __global__ void __launch_bounds__({threads}, {blocks}) {name}(const __grid_constant__ Params p) {{
  const long long step = static_cast<long long>(gridDim.x) * {threads};
  unsigned sum = 0;
  for (long long i = static_cast<long long>(blockIdx.x) * {threads} + threadIdx.x; i + {last} * step < p.n; i += {vectors} * step) {{
    uint4 v[{vectors}];
#pragma unroll
    for (int j = 0; j < {vectors}; ++j) v[j] = __ldcs(p.x + i + j * step);
#pragma unroll
    for (int j = 0; j < {vectors}; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }}
  if (sum == 0x9e3779b9u) *p.out = sum;
}}
"""


class _ReadParams(KernelParams):
    SLOTS = ("out", "x")
    _fields_ = (*((name, ctypes.c_void_p) for name in SLOTS), ("n", ctypes.c_int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpec(KernelSpec):
    """Every byte once, 16 at a time."""

    HEADER: ClassVar[str] = "read_ceiling"
    FAMILY: ClassVar[Family] = Family.FA2

    @property
    def kernel_name(self) -> str:
        """Its name and the architecture."""
        return f"{self.HEADER}_{self.arch.value.replace('_', '')}"

    @property
    def threads(self) -> int:
        """Threads per block."""
        return _THREADS

    @property
    def shared_memory(self) -> int:
        """None."""
        return 0

    @property
    def expected_instructions(self) -> tuple[str, ...]:
        """Loads of 16 bytes."""
        return ("LDG.E.EF.128",)

    def body(self) -> str:
        """The kernel itself, without a header."""
        return _SOURCE.format(threads=_THREADS, blocks=_BLOCKS, name=self.kernel_name, vectors=_VECTORS, last=_VECTORS - 1)

    def work_tiles(self, problem: AttentionProblem) -> int:
        """None: no request is answered by it."""
        del problem
        return 0

    def pack(self, problem: AttentionProblem, out: ArrayInfo) -> KernelParams:
        """Not of a problem."""
        raise NotImplementedError


def read_ceiling(device: torch.device) -> float:
    """GB/s of reading 4 GiB, the median of three runs."""
    import torch

    index = device.index or 0
    source = torch.zeros(READ_BYTES // 4, dtype=torch.int32, device=device)
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with current_context(index):  # not load_kernel, which records the kernels of users' calls
        kernel = _load_module(compile_kernel(ReadSpec(arch=best_arch(Device("cuda", index)))), index)
    grid = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count
    launch = kernel.launch_of(_ReadParams(n=READ_BYTES // 16), grid, _ReadParams.SLOTS)
    stream = torch.cuda.current_stream(device).cuda_stream

    def call() -> None:
        launch.launch(stream, (out.data_ptr(), source.data_ptr()))

    timing = measure_in_turns({"read": Contestant([call], nullcontext)}, rounds=3, seed=0)["read"]
    step = grid * _THREADS * _VECTORS
    read = READ_BYTES // 16 // step * step * 16  # the rest is left out
    return float(read / timing.ms * 1e-6)
