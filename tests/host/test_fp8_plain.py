"""Dense and packed fp8 calls that mma.sync answers, behind requests and functions: a fake GPU runs the kernels' own source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.actor import FlashAttnActor, FlashAttnMsg, FlashAttnProps  # noqa: E402
from atomr_accel_flashattn.launch.driver import DeviceProperties  # noqa: E402
from atomr_accel_flashattn.types import DType, ScaleUnit, SmArch  # noqa: E402
from tests.cases import Case  # noqa: E402
from tests.check import Run  # noqa: E402
from tests.emulator.build import compiler  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import take_for_cuda  # noqa: E402
from tests.fakes.waiting import PATIENCE  # noqa: E402
from tests.fp8 import Quantised, check_fp8  # noqa: E402
from tests.fp8_cases import Fp8Types, fp8_call  # noqa: E402
from tests.kv_cache.cases import download  # noqa: E402
from tests.kv_cache.test_kernels import on_card  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")]

DENSE = Case(seqlen_q=3, seqlen_k=530, heads=2, heads_kv=1, head_dim=32, v_head_dim=32, right=0)
PACKED = Case(lengths_q=(3, 0, 20), lengths_k=(40, 9, 150), heads=2, heads_kv=1, head_dim=32, v_head_dim=32, left=60, right=0)
NARROW = Fp8Types(unit=ScaleUnit.BLOCK)
WIDE = Fp8Types(DType.BF16, DType.F8E5M2, DType.F8E4M3)
SPLIT = ["fp8_kvcache", "split_combine"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return card(monkeypatch, SmArch.SM_89)


def card(monkeypatch: pytest.MonkeyPatch, arch: SmArch) -> FakeGpu:
    take_for_cuda(monkeypatch, STREAM)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    made = FakeGpu(DeviceProperties("Fake", (8, 9), 2, 1 << 30))
    made.install(monkeypatch, arch)
    return made


def headers(gpu: FakeGpu) -> list[str]:
    return [spec.HEADER for spec, *_ in gpu.launches]


def answer(call: Quantised, place: Any = on_card) -> Any:
    """What the functional call gives, with its LSE."""
    meant = call.meant
    arrays = [place(x) for x in (call.q, call.k, call.v)]
    asked: dict[str, Any] = {name: place(x) for name, x in call.descales.items()}
    asked |= {"window_size": (-1 if meant.left is None else meant.left, 0), "return_attn_probs": True}
    if meant.cu_seqlens_q is None:
        return fa.flash_attn_func(*arrays, **asked)[:2]
    ends = (place(meant.cu_seqlens_q), place(meant.cu_seqlens_k), meant.max_seqlen_q, meant.max_seqlen_k)
    return fa.flash_attn_varlen_func(*arrays, *ends, **asked)[:2]


def check(call: Quantised, out: Any, lse: Any) -> None:
    check_fp8("fake GPU", call, Run(download(out), download(lse)), DType.BF16)


@pytest.mark.parametrize("types", [NARROW, WIDE], ids=str)
def test_dense_calls_of_few_queries_split_their_keys(gpu: FakeGpu, types: Fp8Types):
    call = fp8_call(DENSE, types)
    for _ in range(2):
        check(call, *answer(call))
    assert headers(gpu) == SPLIT * 2
    assert gpu.repeated == [False, False, True, True]
    assert {(spec.plain_kv, spec.split, spec.tile.block_m) for spec, *_ in gpu.launches[::2]} == {(True, True, 16)}


@pytest.mark.parametrize("types", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("spare", [0, 30])
def test_packed_calls_and_rows_that_no_sequence_owns(gpu: FakeGpu, types: Fp8Types, spare: int):
    call = fp8_call(PACKED, types)
    longer = (np.concatenate([x, np.full((spare, *x.shape[1:]), np.nan, x.dtype)]) for x in (call.q, call.k, call.v))
    out, lse = answer(replace(call, **dict(zip("qkv", longer, strict=True))))
    rows = len(call.q)
    check(call, out[:rows], lse[:, :rows])
    assert not download(out[rows:]).any()
    assert np.isneginf(download(lse[:, rows:])).all()
    assert headers(gpu) == ["fp8_kvcache"]


def test_no_keys_give_zeros(gpu: FakeGpu):
    call = fp8_call(replace(DENSE, seqlen_k=0, right=None), replace(NARROW, unit=ScaleUnit.TENSOR))
    out, lse = answer(call)
    assert not download(out).any()
    assert np.isneginf(download(lse)).all()
    assert headers(gpu) == ["fp8_kvcache"]


def test_hopper_gives_a_q_of_16_bits_to_mma_sync_without_being_asked(monkeypatch: pytest.MonkeyPatch):
    gpu = card(monkeypatch, SmArch.SM_90A)
    call = fp8_call(PACKED, WIDE)
    check(call, *answer(call))
    spec: Any = gpu.launches[0][0]
    assert (headers(gpu), spec.arch) == (["fp8_kvcache"], SmArch.SM_90)


def test_the_actor_answers_like_a_call(gpu: FakeGpu):
    call = fp8_call(DENSE, NARROW)
    options = fa.Fp8Options(**{name: on_card(x) for name, x in call.descales.items()})
    request = fa.DenseFwdRequest(*(on_card(x) for x in (call.q, call.k, call.v)), mask=fa.MaskKind.causal(), fp8=options)
    with FlashAttnActor.start(FlashAttnProps(device="cuda:0")) as actor:
        reply = actor.ask(FlashAttnMsg.Forward(request))
        gpu.driver.complete()
        output = reply.result(PATIENCE)
    check(call, output.out, output.lse)
    assert headers(gpu) == SPLIT


def test_borrowed_tiles_are_those_of_as_many_rows(gpu: FakeGpu):
    call = fp8_call(replace(DENSE, seqlen_q=70, seqlen_k=40), NARROW)
    options = fa.Fp8Options(**{name: on_card(x) for name, x in call.descales.items()})
    request = fa.DenseFwdRequest(*(on_card(x) for x in (call.q, call.k, call.v)), mask=fa.MaskKind.causal(), fp8=options)
    output = fa.run(request, tiles_for=SmArch.SM_120)
    check(call, output.out, output.lse)
    spec: Any = gpu.launches[0][0]
    assert (spec.arch, spec.tile.block_m, spec.split, spec.fp8_products) == (SmArch.SM_89, 128, False, True)
