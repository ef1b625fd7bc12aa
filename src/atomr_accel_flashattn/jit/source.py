"""The source text of a kernel: a few lines that include the headers and name one Config. Everything else is package data in cuda/."""

from __future__ import annotations

from typing import Final

from .spec import Direction, Family, KernelSpec
from .wgmma import wgmma_leaves

__all__ = ["ROOT_HEADERS", "body_source", "kernel_source"]

# The header that defines a kernel and includes all others, by the family and direction that kernel names begin with.
ROOT_HEADERS: Final = {
    "fa2_fwd": "kernels/fa2_fwd.cuh",
    "fa3_fwd": "kernels/fa3_fwd.cuh",
    "fa2_dropout_mask": "kernels/dropout_mask.cuh",
}

_FA2_FORWARD = """\
#include "{header}"

extern "C" __global__ void __launch_bounds__({threads}, {min_blocks}) {name}(const __grid_constant__ fa::FwdParams p) {{
  fa::fa2_forward<fa::Config{{
{config}
  }}>(p);
}}
"""

_FA3_FORWARD = """\
#include "{header}"

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(const __grid_constant__ fa::Fa3FwdParams p) {{
  fa::fa3_forward<fa::Config{{
{config}
  }}>(p);
}}
"""

_DROPOUT_MASK = """\
#include "{header}"

extern "C" __global__ void __launch_bounds__(128) {name}(const __grid_constant__ fa::DropoutMaskParams p) {{
  fa::dropout_mask<{varlen}>(p);
}}
"""


def kernel_source(spec: KernelSpec) -> str:
    """CUDA C++ that defines the one kernel ``spec.kernel_name``. Equal specs give equal text."""
    return leaves_source(spec) + body_source(spec)


def leaves_source(spec: KernelSpec) -> str:
    """The instructions that have to be written out for this kernel; empty for all but the FA3 family."""
    if spec.family is not Family.FA3:
        return ""
    return '#include "ptx/wgmma.cuh"\n\n' + wgmma_leaves({spec.tile.block_n, spec.v_head_dim}, spec.dtype) + "\n"


def body_source(spec: KernelSpec) -> str:
    """The kernel without those."""
    header = ROOT_HEADERS[f"{spec.family.value}_{spec.direction.value}"]
    if spec.direction is Direction.DROPOUT_MASK:
        return _DROPOUT_MASK.format(header=header, name=spec.kernel_name, varlen=_literal(spec.varlen))
    config = ",\n".join(f"    .{name} = {_literal(value)}" for name, value in _config(spec).items())
    if spec.family is Family.FA3:
        return _FA3_FORWARD.format(header=header, threads=spec.tile.threads, name=spec.kernel_name, config=config)
    return _FA2_FORWARD.format(
        header=header, threads=spec.tile.threads, min_blocks=spec.tile.min_blocks, name=spec.kernel_name, config=config
    )


def _config(spec: KernelSpec) -> dict[str, int | str]:
    """Members of cuda/attention/config.cuh's Config, in their order."""
    return {
        "dtype": f"fa::DType::{spec.dtype.name}",
        "head_dim": spec.head_dim,
        "v_head_dim": spec.v_head_dim,
        "block_m": spec.tile.block_m,
        "block_n": spec.tile.block_n,
        "warps": spec.tile.warps,
        "stages": spec.tile.stages,
        "exact_head_dim": spec.exact_head_dim,
        "aligned": spec.aligned,
        "left_bound": spec.left_bound,
        "right_bound": spec.right_bound,
        "sink_tokens": spec.sink_tokens,
        "alibi": spec.alibi,
        "softcap": spec.softcap,
        "scale_first": spec.prescale,
        "learned_sink": spec.learned_sink,
        "dropout": spec.dropout,
        "varlen": spec.varlen,
        "pack_gqa": spec.pack_gqa,
        "ping_pong": spec.tile.ping_pong,
        "persistent": spec.tile.persistent,
    }


def _literal(value: int | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
