"""Every kernel compiles for every architecture, holds the instructions its spec expects, and spills nothing that is not known."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import pytest

from atomr_accel_flashattn.dispatch import lookup
from atomr_accel_flashattn.dispatch.key import DispatchKey, Extras
from atomr_accel_flashattn.jit.compile import compile_kernel
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.limits import HEAD_DIM_WIDTHS
from atomr_accel_flashattn.types import DType, SmArch
from tests.compile.disassembly import opcodes, sequence
from tests.compile.kernels import (
    ARCHS,
    DTYPES,
    WGMMA_WIDTHS,
    all_specs,
    feature_specs,
    plain_specs,
    wgmma_crowded_specs,
    wgmma_feature_specs,
    wgmma_plain_specs,
)
from tests.compile.known_spills import KNOWN_SPILLS, allowed_spill

SPECS = all_specs()
# Of a thread at the start, by the warps of a block: 64 Ki over three to five warpgroups. setmaxnreg then moves them to those that compute.
WGMMA_REGISTERS = {12: 168, 16: 128, 20: 96}
# Where registers, spills, sizes and seconds go, one JSON line a kernel; unset writes nothing.
RECORD = os.environ.get("ATOMR_FLASHATTN_COMPILE_RECORD")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kernel_name)
def test_kernel_compiles_with_its_instructions_and_without_new_spills(spec: KernelSpec, tmp_path: Path) -> None:
    kernel = compile_kernel(spec)
    found = opcodes(kernel.cubin, tmp_path)
    if RECORD:
        _write_line(Path(RECORD), kernel.registers, kernel.spill_bytes, len(kernel.cubin), kernel.compile_seconds, name=spec.kernel_name)
    for expected in spec.expected_instructions:
        assert any(_is(opcode, expected) for opcode in found), f"no {expected} in the SASS; there are {sorted(found)}"
    assert "C75" not in kernel.log, kernel.log
    allowed = allowed_spill(spec.kernel_name)
    assert kernel.spill_bytes <= allowed, (
        f"{kernel.spill_bytes} bytes of spills with {kernel.registers} registers, {allowed} are known; "
        "make the tile smaller, or enter it in tests/compile/known_spills.py with the reason"
    )
    assert spec.shared_memory <= spec.arch.shared_memory_per_block
    if spec.family is Family.FA3:
        assert kernel.registers == WGMMA_REGISTERS[spec.tile.warps]
        assert any(_is(opcode, "USETMAXREG") for opcode in found)


@pytest.mark.parametrize("causal", [False, True])
def test_two_warpgroups_find_their_maxima_before_they_wait_for_the_product_with_v(causal: bool, tmp_path: Path) -> None:
    key = DispatchKey(SmArch.SM_90A, DType.BF16, 128, causal=causal, extras=Extras(short_q=True))
    spec = lookup(key)
    assert isinstance(spec, KernelSpec)
    code = sequence(compile_kernel(spec).cubin, tmp_path)
    waits = [at for at, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR")]
    between = [
        sum("FMNMX" in line for line in code[first:second])
        for first, second in pairwise(waits)
        if code[first].endswith("0x1 ;") and code[second].endswith("0x0 ;")
    ]
    assert max(between) >= spec.tile.block_n // 2  # of a thread's scores: two rows, a quarter of the keys each


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_warps_meet_between_reading_which_pages_there_are_and_the_product(softcap: float, tmp_path: Path) -> None:
    """One thread releases the stage for four warps; wgmma takes turns without softcap, and none with it."""
    key = DispatchKey(SmArch.SM_90A, DType.BF16, 128, causal=True, varlen=True, gqa_ratio=4, paged=True)
    spec = lookup(replace(key, extras=Extras(family=Family.FA3, softcap=softcap)))
    assert isinstance(spec, KernelSpec)
    assert spec.tile.ping_pong is not bool(softcap)
    code = sequence(compile_kernel(spec).cubin, tmp_path)
    reads = [at for at, line in enumerate(code) if line.startswith("LDS R")]  # those of the scheduler are LDS.128
    assert len(reads) == 3  # before the first tile, before that of a further work tile, and in the loop
    for read in reads:
        product = next(at for at in range(read, len(code)) if code[at].startswith("HGMMA"))
        assert any(line.startswith("BAR.SYNC") for line in code[read:product])


def test_every_arch_type_and_width_is_compiled() -> None:
    assert {(spec.arch, spec.dtype, spec.head_dim) for spec in plain_specs()} == {
        (arch, dtype, width) for arch in ARCHS for dtype in DTYPES for width in HEAD_DIM_WIDTHS
    }


def test_every_feature_is_compiled_on_and_off_with_every_arch() -> None:
    specs = feature_specs()
    flags = [field.name for field in fields(ForwardSpec) if field.type == "bool" and field.name != "pack_gqa"]
    for arch in ARCHS:
        of_arch = [spec for spec in specs if spec.arch is arch]
        for flag in flags:
            assert {getattr(spec, flag) for spec in of_arch} == {False, True}, f"{arch.value}: {flag}"


def test_the_wgmma_family_is_compiled_with_every_type_and_width_and_every_feature_on_and_off() -> None:
    plain, featured = wgmma_plain_specs(), wgmma_feature_specs()
    widths = {*WGMMA_WIDTHS, *((width, width) for width in HEAD_DIM_WIDTHS)}
    assert {(spec.dtype, spec.head_dim, spec.v_head_dim) for spec in plain} == {(dtype, d, dv) for dtype in DTYPES for d, dv in widths}
    assert {(spec.dtype, spec.head_dim, spec.v_head_dim) for spec in featured} >= {
        (dtype, d, dv) for dtype in DTYPES for d, dv in WGMMA_WIDTHS
    }
    assert {spec.family for spec in (*plain, *featured)} == {Family.FA3}
    assert {spec.tile.persistent for spec in featured} == {False, True}
    flags = [field.name for field in fields(ForwardSpec) if field.type == "bool" and field.name != "aligned"]
    for flag in flags:
        assert {getattr(spec, flag) for spec in featured} == {False, True}, flag


def test_every_number_of_warpgroups_is_compiled_with_all_that_it_is_given() -> None:
    assert {spec.tile.warps for spec in wgmma_crowded_specs()} == set(WGMMA_REGISTERS)


def test_known_spills_are_of_kernels_that_exist() -> None:
    for spill in KNOWN_SPILLS:
        assert any(fnmatchcase(spec.kernel_name, spill.pattern) for spec in SPECS), spill.pattern


def _is(opcode: str, expected: str) -> bool:
    """``HMMA`` is in ``HMMA.16816.F32``; ``IMAD.WIDE.U32`` in ``IMAD.WIDE.U32.X``."""
    return opcode == expected or opcode.startswith(expected + ".")


def _write_line(path: Path, registers: int, spill_bytes: int, cubin_bytes: int, seconds: float, *, name: str) -> None:
    line = {"kernel": name, "registers": registers, "spill_bytes": spill_bytes, "cubin_bytes": cubin_bytes, "seconds": round(seconds, 3)}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
