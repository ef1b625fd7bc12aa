"""The kernels that the jitter tests run on a card compile here: with naps, and with naps and a flaw, wgmma still overlapped."""

from __future__ import annotations

from pathlib import Path

import pytest

from atomr_accel_flashattn.dispatch import DispatchKey, lookup
from atomr_accel_flashattn.dispatch.key import Extras
from atomr_accel_flashattn.jit.nvrtc import compile_source
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.types import DType, SmArch
from tests.gpu.jitter import CACHE_FLAW, CACHE_NAPS, FLAWS, Flaw, headers_with_naps

CASES = (
    *((SmArch.SM_90A, width, flawed) for width in (64, 128, 256) for flawed in (False, True)),
    (SmArch.SM_90, 128, False),
    (SmArch.SM_90, 128, True),
    (SmArch.SM_80, 64, False),
)


@pytest.mark.parametrize(("arch", "width", "flawed"), CASES)
def test_a_kernel_with_naps_compiles(tmp_path: Path, arch: SmArch, width: int, flawed: bool):
    spec = lookup(DispatchKey(arch, DType.BF16, width, causal=True, varlen=True))
    assert isinstance(spec, KernelSpec)
    assert spec.family is (Family.FA3 if arch is SmArch.SM_90A else Family.FA2)
    headers = headers_with_naps(tmp_path / "cuda", FLAWS[spec.family] if flawed else None)
    assert compile_source(spec.kernel_name, spec.source(), arch.value, [headers]).cubin


def test_a_wgmma_kernel_over_a_cache_with_naps_compiles(tmp_path: Path):
    spec = lookup(DispatchKey(SmArch.SM_90A, DType.BF16, 128, causal=True, paged=True, extras=Extras(family=Family.FA3, split=True)))
    assert isinstance(spec, Fa3KvCacheSpec)
    assert compile_source(spec.kernel_name, spec.source(), "sm_90a", [headers_with_naps(tmp_path / "cuda")]).cubin


@pytest.mark.parametrize("flaw", [CACHE_NAPS, CACHE_FLAW], ids=["sound", "flawed"])
def test_a_kernel_over_a_cache_with_naps_compiles(tmp_path: Path, flaw: Flaw):
    spec = lookup(DispatchKey(SmArch.SM_90, DType.BF16, 128, paged=True, extras=Extras(cache_rows=32)))
    assert isinstance(spec, Fa2KvCacheSpec)
    assert compile_source(spec.kernel_name, spec.source(), "sm_90", [headers_with_naps(tmp_path / "cuda", flaw)]).cubin
