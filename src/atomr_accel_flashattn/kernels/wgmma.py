"""The wgmma leaves of one kernel. An instruction names each of its up to 128 accumulators, so the text is written for the sizes needed."""

from __future__ import annotations

from ..types import DType

__all__ = ["wgmma_leaves"]

_LEAVES = """\
template <>
struct Wgmma<{n}, DType::{dtype}> {{
  static __device__ __forceinline__ void ss(float (&d)[{tiles}][4], uint64_t a, uint64_t b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{acc}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{d}}}, %{a}, %{b}, p, 1, 1, 0, 0;\\n}}\\n"
                 : {outputs}
                 : "l"(a), "l"(b), "r"(accumulate));
  }}
  static __device__ __forceinline__ void rs(float (&d)[{tiles}][4], const uint32_t (&a)[4], uint64_t b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{d}}}, {{%{a}, %{a1}, %{a2}, %{a3}}}, %{b4}, 1, 1, 1, 1;\\n"
                 : {outputs}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }}
}};
"""


def wgmma_leaves(sizes: set[int], dtype: DType) -> str:
    """Specialisations of ``fa::ptx::Wgmma`` for these N (multiples of 8 up to 256) in one element type (PTX ISA, "wgmma.mma_async")."""
    return "namespace fa::ptx {\n" + "".join(_leaf(n, dtype) for n in sorted(sizes)) + "}  // namespace fa::ptx\n"


def _leaf(n: int, dtype: DType) -> str:
    count = n // 2
    return _LEAVES.format(
        n=n,
        dtype=dtype.name,
        ptx=dtype.value,
        tiles=n // 8,
        d=", ".join(f"%{i}" for i in range(count)),
        outputs=", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count)),
        a=count,
        a1=count + 1,
        a2=count + 2,
        a3=count + 3,
        b=count + 1,
        b4=count + 4,
        acc=count + 2,
    )
