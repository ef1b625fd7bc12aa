"""Fa3FwdRequest on a fake GPU: which family answers it, how its tiles are handed out, and what its tensor maps and counters are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import dispatch  # noqa: E402
from atomr_accel_flashattn.dispatch import arch as dispatch_arch  # noqa: E402
from atomr_accel_flashattn.dispatch.key import DispatchKey  # noqa: E402
from atomr_accel_flashattn.errors import ArchUnsupportedError, ScheduleError  # noqa: E402
from atomr_accel_flashattn.fa3 import Fa3FwdRequest, PersistentMode  # noqa: E402
from atomr_accel_flashattn.kernels.forward import ForwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.tiles.tables import is_short_q  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

from .calls import Call, host  # noqa: E402

pytestmark = pytest.mark.torch

CALL = Call(head_dim=64, v_head_dim=64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    card = FakeGpu()
    card.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return card


def tensors(call: Call = CALL) -> tuple[torch.Tensor, ...]:
    rows, heads, widths = (call.seqlen_q, *[call.seqlen_k] * 2), (call.heads, *[call.heads_kv] * 2), (*[call.head_dim] * 2, call.v_head_dim)
    return tuple(call.tensor(number, *shape) for number, shape in enumerate(zip(rows, heads, widths, strict=True)))


def check(gpu: FakeGpu, call: Call = CALL, **options: Any) -> ForwardSpec:
    """Run a request on the fake GPU, which judges its parameters, and on the CPU; the spec of the launch."""
    on_cpu = tensors(call)
    output = fa.run(Fa3FwdRequest(*map(fake, on_cpu), **options))
    expected = fa.run(fa.Fa2FwdRequest(*on_cpu, mask=options.get("mask", fa.MaskKind.full())))
    np.testing.assert_allclose(host(output.out), host(expected.out), rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(host(output.lse), host(expected.lse), rtol=1e-3, atol=1e-3)
    return gpu.launches[-1][0]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bfloat16"},
        {"batch": 1},
        {"seqlen_q": 1, "seqlen_k": 1},
        {"seqlen_q": 200, "seqlen_k": 300},
        {"heads": 8, "heads_kv": 1},
        {"heads": 1, "heads_kv": 1},
        {"head_dim": 40, "v_head_dim": 24},
        {"head_dim": 192, "v_head_dim": 128},
        {"head_dim": 64, "v_head_dim": 256},
        {"head_dim": 256, "v_head_dim": 256},
        {"pad": 8},
        {"pad": 8, "moved": "v"},
        {"heads_first": True},
        {"offset": 8},
    ],
    ids=str,
)
def test_maps_are_those_of_the_arguments(gpu: FakeGpu, change: dict[str, Any]):
    for mask in (fa.MaskKind.full(), fa.MaskKind.causal(), fa.MaskKind.window(3, 1)):
        spec = check(gpu, replace(CALL, **change), mask=mask)
        assert (spec.family, spec.arch) == (Family.FA3, SmArch.SM_90A)


@pytest.mark.parametrize("change", [{"offset": 1}, {"offset": 4}, {"pad": 1}, {"pad": 4, "moved": "k"}], ids=str)
def test_arrays_that_tensor_copies_cannot_read_take_the_other_family(gpu: FakeGpu, change: dict[str, Any]):
    spec = check(gpu, replace(CALL, **change))
    assert (spec.family, spec.arch, spec.aligned) == (Family.FA2, SmArch.SM_90, False)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_arrays_that_are_walked_backwards_take_the_other_family(axis: int):
    q = np.zeros((2, 5, 4, 64), np.float16)
    backwards = np.flip(np.zeros((2, 5, 4, 64), np.float16), axis)
    for arrays in ((backwards, q, q), (q, backwards, q), (q, q, backwards)):
        spec = dispatch.lookup(Fa3FwdRequest(*arrays).dispatch_key(SmArch.SM_90A))
        assert isinstance(spec, ForwardSpec)
        assert spec.family is Family.FA2
    one = np.flip(np.zeros((1, 1, 1, 64), np.float16), axis)
    spec = dispatch.lookup(Fa3FwdRequest(one, one, one).dispatch_key(SmArch.SM_90A))
    assert isinstance(spec, ForwardSpec)
    assert spec.family is Family.FA3


def test_no_keys_and_no_queries(gpu: FakeGpu):
    q, k = fake(torch.randn(2, 5, 4, 64).half()), fake(torch.empty(2, 0, 4, 64).half())
    output = fa.run(Fa3FwdRequest(q, k, k))
    assert (output.out == 0).all()
    assert torch.isneginf(output.lse).all()
    assert len(gpu.launches) == 1
    assert fa.run(Fa3FwdRequest(k, q, q)).out.shape == k.shape
    assert len(gpu.launches) == 1


def test_heads_that_share_memory_are_not_copied(gpu: FakeGpu):
    q = fake(torch.randn(2, 5, 4, 64).half())
    k = fake(torch.randn(2, 9, 1, 64).half()).expand(2, 9, 4, 64)
    fa.run(Fa3FwdRequest(q, k, k))
    assert gpu.launches[-1][0].family is Family.FA3
    assert gpu.last.k == k.data_ptr()


@pytest.mark.parametrize(
    ("mode", "heads", "persistent", "grid"),
    [
        pytest.param(PersistentMode.auto(), 4, False, 8, id="auto: a block for each tile while there are enough multiprocessors"),
        pytest.param(PersistentMode.auto(), 12, True, 20, id="auto: persistent when there are more tiles"),
        pytest.param(PersistentMode.Grid(), 12, False, 24, id="Grid"),
        pytest.param(PersistentMode.Persistent(), 12, True, 20, id="Persistent"),
        pytest.param(PersistentMode.Persistent(), 4, True, 8, id="Persistent with fewer tiles than blocks"),
        pytest.param(PersistentMode.Persistent(3), 12, True, 3, id="Persistent(3)"),
        pytest.param(PersistentMode.Persistent(100), 12, True, 24, id="Persistent(100)"),
    ],
)
def test_how_tiles_are_handed_out(gpu: FakeGpu, mode: PersistentMode, heads: int, persistent: bool, grid: int):
    gpu.properties = gpu.properties._replace(multiprocessors=20)
    spec = check(gpu, replace(CALL, heads=heads, heads_kv=heads), persistent=mode)
    assert spec.tile.persistent == persistent
    assert gpu.grids[-1] == grid
    assert bool(gpu.counters) == persistent


@pytest.mark.parametrize("blocks", [0, -1, True, 2.0, "3"])
def test_numbers_of_blocks_that_are_refused(blocks: Any):
    with pytest.raises(ScheduleError, match="positive integer"):
        PersistentMode.Persistent(blocks)


def test_blocks_without_persistent_are_refused():
    with pytest.raises(ScheduleError, match="with persistent=True"):
        PersistentMode(blocks=3)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "told_apart"),
    [(64, 64, True), (56, 64, True), (128, 128, True), (120, 104, True), (64, 128, False), (256, 256, False)],
)
def test_short_sequences_have_a_tile_of_their_own(head_dim: int, v_head_dim: int, told_apart: bool):
    def spec(rows: int) -> ForwardSpec:
        q, k, v = (np.zeros((1, n, 1, d), np.float16) for n, d in ((rows, head_dim), (9, head_dim), (9, v_head_dim)))
        found = dispatch.lookup(fa.DenseFwdRequest(q, k, v).dispatch_key(SmArch.SM_90A))
        assert isinstance(found, ForwardSpec)
        return found

    longest = max((rows for rows in range(1, 8192) if is_short_q(head_dim, v_head_dim, rows)), default=1)
    short, long = spec(longest), spec(longest + 1)
    assert (short.tile != long.tile) == told_apart
    assert short == spec(1)
    assert long == spec(8192)
    assert replace(short, tile=long.tile) == long


def test_the_longest_of_packed_sequences_decides():
    q = np.zeros((1200, 1, 128), np.float16)
    tiles = []
    for lengths in ([200, 1000], [1200], [600, 600]):
        packed = fa.CumulativeSeqlens.from_lengths(lengths, like=q)
        key = fa.VarlenFwdRequest(q, q, q, cu_seqlens_q=packed).dispatch_key(SmArch.SM_90A)
        assert key.extras.short_q == is_short_q(128, 128, max(lengths))
        tiles.append(dispatch.lookup(key).tile)  # type: ignore[union-attr]
    assert tiles[0] == tiles[2] != tiles[1]


@pytest.mark.parametrize(
    ("ratio", "bias", "rows_of_a_query"),
    [
        pytest.param(1, None, 1, id="one head"),
        pytest.param(4, None, 4, id="packed"),
        pytest.param(3, None, 1, id="3 does not divide 64"),
        pytest.param(4, fa.PositionBias(np.ones(4, np.float32)), 1, id="ALiBi"),
    ],
)
def test_heads_that_are_packed_count_as_rows(ratio: int, bias: Any, rows_of_a_query: int):
    longest = max(rows for rows in range(1, 8192) if is_short_q(128, 128, rows))

    def short_q(rows: int, request: Any = fa.DenseFwdRequest, arch: SmArch = SmArch.SM_90A) -> bool:
        q, k = np.zeros((1, rows, ratio, 128), np.float16), np.zeros((1, 9, 1, 128), np.float16)
        key = request(q, k, k, bias=bias or fa.PositionBias()).dispatch_key(arch)
        return bool(key.extras.short_q)

    for request in (fa.DenseFwdRequest, Fa3FwdRequest):
        assert short_q(longest // rows_of_a_query, request)
        assert not short_q(longest // rows_of_a_query + 1, request)
    assert short_q(longest, fa.Fa2FwdRequest) == short_q(longest, arch=SmArch.SM_90), "the other family packs nothing"


@pytest.mark.parametrize(("heads", "heads_kv", "packed"), [(8, 4, True), (8, 1, True), (64, 1, True), (6, 2, False), (5, 5, False)])
def test_a_tile_has_the_rows_of_all_heads_that_share_keys(gpu: FakeGpu, heads: int, heads_kv: int, packed: bool):
    spec = check(gpu, replace(CALL, heads=heads, heads_kv=heads_kv, seqlen_q=70), mask=fa.MaskKind.causal())
    group = heads // heads_kv if packed else 1
    assert spec.pack_gqa == packed
    assert (gpu.last.work_heads, gpu.last.packed_shift) == (heads // group, group.bit_length() - 1)
    assert gpu.last.blocks_m == -(-70 * group // spec.tile.block_m)


@pytest.mark.parametrize("arch", [SmArch.SM_100, SmArch.SM_120])
def test_later_architectures_answer_with_the_other_family(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, arch: SmArch):
    monkeypatch.setattr(dispatch_arch, "_arch_of_gpu", lambda _index: arch)
    spec = check(gpu, persistent=PersistentMode.Persistent(3))
    assert (spec.family, spec.arch) == (Family.FA2, arch)


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86, SmArch.SM_89])
def test_earlier_architectures_refuse(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, arch: SmArch):
    monkeypatch.setattr(dispatch_arch, "_arch_of_gpu", lambda _index: arch)
    with pytest.raises(ArchUnsupportedError, match=f"got fa3 on {arch.value}, which has no wgmma"):
        fa.run(Fa3FwdRequest(*map(fake, tensors())))


def test_the_cpu_backend_answers_too():
    on_cpu = tensors()
    np.testing.assert_array_equal(host(fa.run(Fa3FwdRequest(*on_cpu)).out), host(fa.run(fa.Fa2FwdRequest(*on_cpu)).out))


@pytest.mark.parametrize(
    ("features", "consumers"),
    [
        pytest.param({}, 3, id="plain"),
        pytest.param({"alibi": True}, 3, id="alibi"),
        pytest.param({"softcap": 5.0}, 3, id="softcap"),
        pytest.param({"alibi": True, "softcap": 5.0}, 4, id="alibi and softcap"),
        pytest.param({"dropout": True}, 2, id="dropout"),
    ],
)
def test_how_many_warpgroups_share_the_registers(features: dict[str, Any], consumers: int):
    extras = fa.Extras(softcap=features.get("softcap", 0.0), dropout=features.get("dropout", False), learned_sink=True)
    key = DispatchKey(
        SmArch.SM_90A, DType.F16, 64, causal=True, varlen=True, sliding_window=(64, 0), sink=4, alibi="alibi" in features, extras=extras
    )
    spec = dispatch.lookup(key)
    assert isinstance(spec, ForwardSpec)
    assert spec.tile.warps == 4 * (consumers + 1)
    assert spec.tile.block_m == 64 * consumers


@pytest.mark.parametrize(("rows", "packed"), [((1 << 29) - 256, True), (1 << 29, False)])
def test_rows_of_heads_that_32_bits_cannot_count_are_not_packed(rows: int, packed: bool):
    q = np.broadcast_to(np.zeros((1, 1, 4, 8), np.float16), (1, rows, 4, 8))
    kv = np.zeros((1, 9, 1, 8), np.float16)
    key = fa.DenseFwdRequest(q, kv, kv).dispatch_key(SmArch.SM_90A)
    spec = dispatch.lookup(key)
    assert isinstance(spec, ForwardSpec)
    assert (spec.family, spec.pack_gqa, key.packs_heads) == (Family.FA3, packed, packed)


def test_one_query_head_expanded_to_many_is_not_packed(gpu: FakeGpu):
    """A tensor map steps over it by 0 bytes, which it cannot do between the rows of one tile."""
    q = torch.randn(1, 70, 1, 64).half().expand(1, 70, 4, 64)
    kv = torch.randn(1, 9, 1, 64).half()
    for each, packed in ((q, False), (q.contiguous(), True)):
        out = fa.run(fa.DenseFwdRequest(*map(fake, (each, kv, kv)))).out
        spec = gpu.launches[-1][0]
        assert isinstance(spec, ForwardSpec)
        assert (spec.family, spec.pack_gqa) == (Family.FA3, packed)
        np.testing.assert_allclose(host(out), host(fa.run(fa.DenseFwdRequest(each, kv, kv)).out), rtol=1e-2, atol=2e-3)
