"""Batch-invariant calls by the kernels' own source, run on the CPU thread by thread: a row has the same bits in every call."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.emulator.build import compiler  # noqa: E402
from tests.fakes.gpu import FakeGpu  # noqa: E402
from tests.kv_cache.invariant_cases import CASES, WAYS, Asked, check_against_plain, check_way, dense  # noqa: E402
from tests.kv_cache.test_kernels import gpu  # noqa: E402, F401 - a fixture

pytestmark = [pytest.mark.torch, pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")]


@pytest.mark.parametrize("asked", CASES, ids=str)
def test_a_row_has_the_same_bits_in_every_call(gpu: FakeGpu, asked: Asked):  # noqa: F811 - the fixture
    whole = dense(asked)
    check_against_plain(asked, whole)
    counts = {way: check_way(asked, way, whole) for way in WAYS}
    assert counts["pages of 16"] == counts["packed"] == asked.tokens
    specs = {spec for spec, *_ in gpu.launches}
    assert {(spec.HEADER, spec.batch_invariant, spec.split, spec.tile.block_n) for spec in specs} == {
        ("fp8_kvcache" if asked.fp8 else "fa2_kvcache", True, False, 16 if asked.head_dim > 96 else 32)
    }
    assert len({spec.tile.block_m for spec in specs}) > 1, "every call had the same number of rows a tile"
    assert {spec.plain_kv for spec in specs} == {spec.paged for spec in specs} == {False, True}
