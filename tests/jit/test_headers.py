"""The include closure of a kernel: what its cache key and its tuned tiles depend on, and the rooms that includes may point to."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from atomr_accel_flashattn.errors import CompileError
from atomr_accel_flashattn.jit import headers, nvrtc
from atomr_accel_flashattn.jit.compile import cache_key, compile_kernel
from atomr_accel_flashattn.jit.headers import closure_digest, include_closure
from atomr_accel_flashattn.kernels.spec import KernelSpec
from atomr_accel_flashattn.tiles.saved import headers_identity
from atomr_accel_flashattn.types import DType, SmArch
from tests.jit.kernels import (
    APPEND,
    BACKWARD,
    CACHE,
    COMBINE,
    FORWARD,
    FP8,
    FP8_CACHES,
    FP8_WGMMA_CACHE,
    MASK,
    MERGE,
    STEP,
    WGMMA,
    WGMMA_CACHE,
)

ROOMS = ("ptx", "tile", "attention", "kernels")  # includes point to the same room or to one before it
STEPS = dict(zip(("before", "backward", "behind"), BACKWARD.steps(), strict=True))
KERNELS = {
    "fa2": FORWARD,
    "fa3": WGMMA,
    "fa3_fp8": FP8,
    "fa3_fp8_cache": FP8_WGMMA_CACHE,
    "dropout_mask": MASK,
    **STEPS,
    "cache": CACHE,
    "fa3_cache": WGMMA_CACHE,
    "combine": COMBINE,
    "append": APPEND,
    "merge": MERGE,
    **{spec.HEADER: spec for spec in (*STEP, *FP8_CACHES)},
}
HEADERS = sorted(path.relative_to(headers.headers_dir()).as_posix() for path in headers.headers_dir().rglob("*.cuh"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the headers, which the package uses."""
    copy = tmp_path / "cuda"
    shutil.copytree(headers.headers_dir(), copy)
    monkeypatch.setattr(headers, "headers_dir", lambda: copy)
    return copy


def state() -> dict[str, tuple[str, str]]:
    """Cache key and tuned tiles' identity of each kernel, from the headers as they are now."""
    headers._closure.cache_clear()
    return {name: (cache_key(spec, spec.source()).digest, headers_identity(spec.kernel_name)) for name, spec in KERNELS.items()}


def changed(before: dict[str, tuple[str, str]]) -> set[str]:
    """The kernels whose key and identity are others; both change or none does."""
    after = state()
    assert {(old[0] == new[0]) == (old[1] == new[1]) for old, new in zip(before.values(), after.values(), strict=True)} == {True}
    return {name for name, old in before.items() if after[name] != old}


def test_a_new_header_changes_no_key(folder: Path) -> None:
    before = state()
    (folder / "kernels" / "new_kernel.cuh").write_text('#pragma once\n#include "attention/rows.cuh"\n')
    assert changed(before) == set()


@pytest.mark.parametrize("header", HEADERS)
def test_a_changed_header_changes_the_keys_of_the_kernels_that_include_it(folder: Path, header: str) -> None:
    users = {name for name, spec in KERNELS.items() if header in include_closure(spec.source())}
    assert users, "a header that no kernel includes"
    before = state()
    with (folder / header).open("a") as file:
        file.write("// changed\n")
    assert changed(before) == users


def test_families_do_not_share_all_headers() -> None:
    closures = {name: set(include_closure(spec.source())) for name, spec in KERNELS.items()}
    assert "ptx/wgmma.cuh" in closures["fa3"] - closures["fa2"]
    assert "tile/cp_async_pipeline.cuh" in closures["fa2"] - closures["fa3"]
    assert closures["dropout_mask"] < closures["fa2"] & closures["fa3"] | {"kernels/dropout_mask.cuh"}


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_the_closure_is_all_that_a_kernel_needs(spec: KernelSpec, tmp_path: Path) -> None:
    for name in include_closure(spec.source()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(headers.headers_dir() / name, tmp_path / name)
    assert nvrtc.compile_source(spec.kernel_name, spec.source(), spec.arch.value, [tmp_path]).cubin


def test_the_closure_is_sorted_and_follows_only_includes(folder: Path) -> None:
    (folder / "a.cuh").write_text('#include "b.cuh"\n// #include "c.cuh"\nint x; // a\n#include <d>\n')
    (folder / "b.cuh").write_text('#include "a.cuh"\r\n#include "kernels/e.cuh"')
    (folder / "kernels" / "e.cuh").write_text("")
    assert include_closure('#include "b.cuh"\n') == ("a.cuh", "b.cuh", "kernels/e.cuh")
    assert include_closure("int x;") == ()
    assert closure_digest('int x;\n#include "b.cuh"') == closure_digest('#include "b.cuh"\n#include "a.cuh"')


def test_a_missing_header_is_named(folder: Path) -> None:
    (folder / "tile" / "layout.cuh").unlink()
    with pytest.raises(CompileError, match=r'#include "tile/layout.cuh" in \w+/\w+\.cuh: cannot read it in .*; reinstall the package'):
        compile_kernel(FORWARD)
    with pytest.raises(CompileError, match=r'#include "none.cuh" in the source of the kernel: '):
        closure_digest('#include "none.cuh"')


def test_the_identity_of_headers_follows_the_family_and_not_the_tile() -> None:
    other = replace(FORWARD, arch=SmArch.SM_90, dtype=DType.BF16, tile=replace(FORWARD.tile, block_n=32), right_bound=True)
    assert headers_identity(FORWARD.kernel_name) == headers_identity(other.kernel_name) == headers_identity("fa2_fwd")
    assert len({headers_identity(spec.kernel_name) for spec in KERNELS.values()}) == len(KERNELS)
    assert [headers_identity(name) for name in ("", "fa2", "fa9_fwd", "fa3_dropout_mask", "older")] == [""] * 5


@pytest.mark.parametrize("header", HEADERS)
def test_comments_have_at_most_100_columns(header: str) -> None:
    lines = (headers.headers_dir() / header).read_text().splitlines()
    assert [line for line in lines if "//" in line and len(line) > 100] == []


@pytest.mark.parametrize("header", HEADERS)
def test_includes_point_down_the_rooms_and_each_header_stands_alone(header: str) -> None:
    text = (headers.headers_dir() / header).read_text()
    included = re.findall(r'(?m)^#include "([^"]*)"$', text)
    assert len(included) == len(re.findall(r"#\s*include|__has_include", text)), "the closure follows no other form of an include"
    assert included == sorted(set(included)), "includes are sorted"
    rooms = [ROOMS.index(name.split("/")[0]) for name in (header, *included)]
    assert max(rooms) == rooms[0]
    leaf = 'extern "C" __global__ void k() {}'
    assert nvrtc.compile_source("k", f'#include "{header}"\n{leaf}', "sm_90a", [headers.headers_dir()]).cubin
