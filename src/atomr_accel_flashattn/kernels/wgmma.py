"""The wgmma leaves of one kernel. An instruction names each of its up to 128 accumulators, so the text is written for the sizes needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from ..types import DType

__all__ = ["Product", "wgmma_leaves"]

Product: TypeAlias = tuple[int, DType, DType]  # N, and the types of A and B

# Of 8 bits both operands are K-major; of 16 bits an instruction says of each whether it is.
_K_STEP: Final = {2: "k16", 1: "k32"}
_MAJORS: Final = {2: (", 0, 0", ", 1"), 1: ("", "")}

_LEAVES = """\
template <>
struct Wgmma<{n}, DType::{a_dtype}, DType::{b_dtype}> {{
  static __device__ __forceinline__ void ss(float (&d)[{tiles}][4], uint64_t a, uint64_t b, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{acc}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{n}{k}.f32.{a_ptx}.{b_ptx} {{{d}}}, %{a}, %{b}, p, 1, 1{ss_majors};\\n}}\\n"
                 : {outputs}
                 : "l"(a), "l"(b), "r"(accumulate));
  }}
  template <bool kAccumulate = true>
  static __device__ __forceinline__ void rs(float (&d)[{tiles}][4], const uint32_t (&a)[4], uint64_t b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{n}{k}.f32.{a_ptx}.{b_ptx} {{{d}}}, {{%{a}, %{a1}, %{a2}, %{a3}}}, "
                 "%{b4}, %{rs_acc}, 1, 1{rs_majors};\\n"
                 : {outputs}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAccumulate));
  }}
}};
"""


def wgmma_leaves(products: Iterable[Product]) -> str:
    """Specialisations of ``fa::ptx::Wgmma`` (PTX ISA, "wgmma.mma_async"), each product once.

    A product is N, a multiple of 8 up to 256, and the types of A and B, which are one type of 16 bits or any two of 8.
    """
    ordered = sorted(set(products), key=lambda product: (product[0], product[1].name, product[2].name))
    return "namespace fa::ptx {\n" + "".join(_leaf(*product) for product in ordered) + "}  // namespace fa::ptx\n"


def _leaf(n: int, a_dtype: DType, b_dtype: DType) -> str:
    count = n // 2
    ss_majors, rs_majors = _MAJORS[a_dtype.itemsize]
    return _LEAVES.format(
        n=n,
        a_dtype=a_dtype.name,
        b_dtype=b_dtype.name,
        a_ptx=a_dtype.value,
        b_ptx=b_dtype.value,
        tiles=n // 8,
        k=_K_STEP[a_dtype.itemsize],
        ss_majors=ss_majors,
        rs_majors=rs_majors,
        d=", ".join(f"%{i}" for i in range(count)),
        outputs=", ".join(f'"+f"(d[{i // 4}][{i % 4}])' for i in range(count)),
        a=count,
        a1=count + 1,
        a2=count + 2,
        a3=count + 3,
        b=count + 1,
        b4=count + 4,
        acc=count + 2,
        rs_acc=count + 5,
    )
