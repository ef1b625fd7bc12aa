"""Kernels that dawdle: their own source on headers whose device instructions begin with a nap of random length.

A copy of ``cuda/`` is edited, and the compiler is pointed at it for as long as a test runs; everything else, from the request to the
launch, is what users get. ``FLAWS`` take one guard away, so that a test can show that it would see that.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atomr_accel_flashattn.jit import headers, nvrtc
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.launch import launcher as launch
from atomr_accel_flashattn.torch_ops import repeat as plans

if TYPE_CHECKING:
    import pytest

__all__ = ["CACHE_FLAW", "CACHE_NAPS", "FLAWS", "Flaw", "headers_with_naps", "use_headers"]

# Seven times in eight no nap, else up to 2 us, and once in 512 times up to 33 us: longer than a ring of buffers takes to go round. All
# lanes of a warp read one clock, and there is no branch, so a warp stays together for the instructions that want it to.
_NAP = """\
#pragma once
#include "ptx/types.cuh"

namespace fa::ptx {
__device__ __forceinline__ void nap() {
  uint32_t clock, multiprocessor;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  uint32_t h = (clock ^ multiprocessor * 0x9E3779B9u ^ threadIdx.x / 32 * 0x85EBCA6Bu) * 0x7FEB352Du;
  h = (h ^ h >> 15) * 0x846CA68Bu;
  h ^= h >> 16;
  const uint32_t nanoseconds = h & 7 ? 0 : h & 0x1f8 ? h >> 21 : h >> 17;
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}
}  // namespace fa::ptx
"""
_LEAF = re.compile(r"__device__ __forceinline__ void (\w+)\([^{;]*\) \{")
_WITHOUT_NAP = frozenset(
    {"warpgroup_fence_operand", "mma_f16", "mma_bf16"}
)  # no instruction at all, and arithmetic on the registers of one thread
_NEEDED = {
    *("mbarrier_arrive", "mbarrier_arrive_expect_tx", "mbarrier_wait", "tma_load", "wgmma_fence", "wgmma_wait"),
    *("cp_async_16", "cp_async_commit", "cp_async_wait", "ldmatrix_x4", "store_shared_16"),
}


@dataclass(frozen=True, slots=True)
class Flaw:
    """Edits of one header that take a guard away: (pattern, replacement) pairs, each of which has to fit at least once.

    No flaw changes how often a barrier is come to, or lets a warp miss a phase of one: a flawed kernel gives wrong numbers and ends.
    """

    header: str
    edits: tuple[tuple[str, str], ...]

    def apply(self, folder: Path) -> None:
        """Edit the copy in ``folder``."""
        path = folder / self.header
        text = path.read_text()
        for pattern, replacement in self.edits:
            text, count = re.subn(pattern, replacement, text)
            assert count > 0, f"{self.header} has changed: no {pattern!r} is left to be replaced"
        path.write_text(text)


_RELEASE_EARLY = (
    "ptx::named_barrier_sync(threadIdx.x / 128, 128); "
    "if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(pipe_v.empty_barrier()); "
    "ptx::wgmma_fence();"
)
FLAWS = {
    # V is released to the producer before the product has read it, after the whole warpgroup has observed `full`.
    Family.FA3: Flaw(
        "kernels/fa3_fwd.cuh",
        (
            (r"(?s)(void multiply_pv\([^{]*\{.*?)ptx::wgmma_fence\(\);", r"\1" + _RELEASE_EARLY),
            (
                r"(ptx::warpgroup_fence_operand\(product\.of\(rows\)\);\s*(?:if \(pending\) )?)pipe_v\.consumer_release\(\);",
                r"\1pipe_v.advance();",
            ),
        ),
    ),
    # Warps do not wait for each other before a buffer is read or overwritten.
    Family.FA2: Flaw("tile/cp_async_pipeline.cuh", ((r"(consumer_wait\(\) const \{[^}]*?)__syncthreads\(\);", r"\1"),)),
}

# The groups of a block over a KV cache nap between the steps of their merge, which are no device instructions of ours; then without
# waiting for the maxima of the others.
_NAP_IN_MERGE = (r"__syncthreads\(\);", "ptx::nap(); __syncthreads(); ptx::nap();")
CACHE_NAPS = Flaw("kernels/fa2_kvcache.cuh", (_NAP_IN_MERGE,))
CACHE_FLAW = Flaw("kernels/fa2_kvcache.cuh", ((r"(maxima\(\)\[[^;]*;\s*\}\s*)__syncthreads\(\);", r"\1ptx::nap();"), _NAP_IN_MERGE))


def headers_with_naps(folder: Path, flaw: Flaw | None = None) -> Path:
    """Write the edited headers to a new ``folder`` and return it."""
    shutil.copytree(headers.headers_dir(), folder)
    (folder / "nap.cuh").write_text(_NAP)
    napping: set[str] = set()
    for path in (folder / "ptx").glob("*.cuh"):
        text, found = _with_naps(path.read_text())
        if found:
            path.write_text(text.replace("#pragma once\n", '#pragma once\n\n#include "nap.cuh"\n', 1))
        napping |= found
    assert napping >= _NEEDED, f"cuda/ptx has changed: {sorted(_NEEDED - napping)} would not nap"
    if flaw is not None:
        flaw.apply(folder)
    return folder


def use_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone: every kernel is compiled with the headers in ``folder``, and none that was loaded before is used.

    Should naps make some ptxas put one product of wgmma after another, as none does so far (tests/compile/test_jitter.py), that is allowed.
    """
    monkeypatch.setattr(headers, "headers_dir", lambda: folder)
    monkeypatch.setattr(nvrtc, "_SERIALISED", re.compile("(?!)"))
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "_loading", {})
    plans.clear()


def _with_naps(text: str) -> tuple[str, set[str]]:
    """The header with a nap at the beginning of each of its instructions, and their names."""
    napping: set[str] = set()

    def begin(leaf: re.Match[str]) -> str:
        if leaf[1] in _WITHOUT_NAP:
            return leaf[0]
        napping.add(leaf[1])
        return leaf[0] + " nap();"

    return _LEAF.sub(begin, text), napping
