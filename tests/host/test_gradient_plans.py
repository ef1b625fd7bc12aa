"""Backward requests on a fake GPU: which kernels run where, on what, and that a plan is found for what it fits and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import env
from atomr_accel_flashattn.arrays import new
from atomr_accel_flashattn.arrays.read import as_numpy, read_array
from atomr_accel_flashattn.dispatch import arch as dispatch_arch
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.runtime import backend, gradients, plan as store, staleness
from tests.fakes.arrays import FakeArray
from tests.fakes.gpu import FakeGpu

THREE = ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]
HOST = fa.Device("cpu", 0)
FULL = fa.MaskKind.full()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90)
    return card


@dataclass(frozen=True)
class Asked:
    """A backward call, on the fake GPU and in host memory. ``moved``, ``padded`` and ``turned`` name arrays that lie otherwise there."""

    kind: Any = fa.Fa2BwdRequest
    seed: int = 0
    batch: int = 2
    seqlen_q: int = 5
    seqlen_k: int = 9
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: str = "float16"
    scale: float | None = None
    mask: fa.MaskKind = FULL
    softcap: float = 0.0
    sink_tokens: int = 0
    slopes: int = 0  # dimensions
    learned_sink: bool = False
    dropout: float = 0.0
    recompute: bool = False
    dout: bool = True
    dlse: bool = False
    given: str = ""  # of q, k and v, whose gradients go into arrays of the caller
    moved: str = ""
    padded: str = ""
    turned: str = ""
    packed: bool = False
    longest: tuple[int, int] = (12, 20)
    spare: int = 0  # rows that no sequence owns

    def arrays(self) -> dict[str, Any]:
        """All that there is, in host memory."""
        rng = np.random.default_rng(self.seed)
        lead_q, lead_k = ((self.batch, length) for length in (self.seqlen_q, self.seqlen_k))
        if self.packed:
            lead_q, lead_k = ((self.batch * length,) for length in (self.seqlen_q, self.seqlen_k))
        shapes = {
            "q": (*lead_q, self.heads, self.head_dim),
            "k": (*lead_k, self.heads_kv, self.head_dim),
            "v": (*lead_k, self.heads_kv, self.v_head_dim),
            "dout": (*lead_q, self.heads, self.v_head_dim),
        }
        made: dict[str, Any] = {name: rng.standard_normal(shape).astype(self.dtype) for name, shape in shapes.items()}
        lse_shape = (self.heads, *lead_q) if self.packed else (self.batch, self.heads, self.seqlen_q)
        made["dlse"] = rng.standard_normal(lse_shape).astype(np.float32)
        made["slopes"] = rng.random((self.batch, self.heads)[2 - self.slopes :], np.float32) if self.slopes else None
        made["learned_sink"] = rng.random(self.heads, np.float32) if self.learned_sink else None
        made["rng"] = np.array([self.seed, 4]) if self.dropout else None
        if self.packed:
            for name, (total,) in (("cu_q", lead_q), ("cu_k", lead_k)):
                ends = [*(total // self.batch * sequence for sequence in range(self.batch)), total - self.spare]
                made[name] = np.array(ends, np.int32)
        forward = fa.run(self._request(made, None))
        made |= {"out": forward.out, "lse": forward.lse}
        made |= {f"d{name}": np.full_like(made[name], np.nan) for name in self.given}
        return made

    def _request(self, arrays: dict[str, Any], kind: Any, **more: Any) -> Any:
        """Of the forward call, where ``kind`` is None."""
        packing = {}
        if self.packed:
            offsets = (fa.CumulativeSeqlens(arrays[f"cu_{of}"], longest) for of, longest in zip("qk", self.longest, strict=True))
            packing = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets, strict=True))
        return (kind or (fa.VarlenFwdRequest if self.packed else fa.DenseFwdRequest))(
            *(arrays[name] for name in "qkv"),
            mask=self.mask,
            bias=fa.PositionBias(arrays["slopes"]),
            sink_tokens=self.sink_tokens,
            options=fa.AttentionOptions(
                softmax_scale=self.scale,
                softcap=self.softcap,
                learned_sink=arrays["learned_sink"],
                dropout_p=self.dropout,
                rng=arrays["rng"],
            ),
            **packing,
            **more,
        )

    def request(self, arrays: dict[str, Any]) -> Any:
        names = [*(("dout",) if self.dout else ()), *(("dlse",) if self.dlse else ()), *(f"d{name}" for name in self.given)]
        names += [] if self.recompute else ["out", "lse"]
        kind = fa.VarlenBwdRequest if self.packed else self.kind
        return self._request(arrays, kind, recompute=self.recompute, **{name: arrays[name] for name in names})

    def on_card(self, arrays: dict[str, Any], index: int = 0) -> dict[str, Any]:
        return {name: None if array is None else self._placed(name, array, index) for name, array in arrays.items()}

    def _placed(self, name: str, array: np.ndarray, index: int) -> ArrayInfo:
        moved, padded, turned = (name in each.split() for each in (self.moved, self.padded, self.turned))
        shape = array.swapaxes(-3, -2).shape if turned else array.shape
        wide = (*shape[:-1], shape[-1] + 8 * padded)
        room = FakeArray(np.zeros(int(np.prod(wide)) + moved, array.dtype), index)
        view = room.array[int(moved) :].reshape(wide)[..., : shape[-1]]
        view = view.swapaxes(-3, -2) if turned else view
        view[...] = array
        return replace(read_array(view, name), device=fa.Device("cuda", index), source=room)

    def check(self, seed: int = 0, runs: int = 1, **options: Any) -> Any:
        """Every run on the fake GPU gives what the CPU backend gives. Returns the request."""
        asked = replace(self, seed=seed)
        arrays = asked.arrays()
        expected = fa.run(asked.request(arrays))
        request = asked.request(asked.on_card(arrays))
        for _ in range(runs):
            made = fa.run(request, **options)
            for name in ("dq", "dk", "dv", "dsink"):
                got, wanted = getattr(made, name), getattr(expected, name)
                assert (got is None) == (wanted is None)
                if got is not None:
                    np.testing.assert_allclose(on_host(got), wanted, rtol=2e-2, atol=2e-2, err_msg=name)
            for info in request.gradient_arrays:
                if info is not None:
                    on_host(info)[...] = np.nan
        return request


def on_host(array: FakeArray | ArrayInfo) -> np.ndarray:
    return array.array if isinstance(array, FakeArray) else as_numpy(replace(array, device=HOST))


def headers(gpu: FakeGpu) -> list[str]:
    return [spec.HEADER for spec, *_ in gpu.launches]


BASE = Asked()
PACKED = Asked(packed=True)
SIX = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
CHANGES: dict[str, Asked] = {
    "kind": replace(BASE, kind=fa.DenseBwdRequest),
    "packed": PACKED,
    "batch": replace(BASE, batch=3),
    "seqlen_q": replace(BASE, seqlen_q=6),
    "seqlen_k": replace(BASE, seqlen_k=8),
    "heads": replace(BASE, heads=8),
    "heads_kv": replace(BASE, heads_kv=1),
    "head_dim": replace(BASE, head_dim=24),
    "v_head_dim": replace(BASE, v_head_dim=32),
    "scale": replace(BASE, scale=0.5),
    "scale_zero": replace(BASE, scale=0.0),
    "causal": replace(BASE, mask=fa.MaskKind.causal()),
    "window": replace(BASE, mask=fa.MaskKind.window(2, 0)),
    "softcap": replace(BASE, softcap=2.0),
    "sink_tokens": replace(BASE, mask=fa.MaskKind.window(1, 0), sink_tokens=1),
    "slopes": replace(BASE, slopes=1),
    "slopes_per_batch": replace(BASE, slopes=2),
    "learned_sink": replace(BASE, learned_sink=True),
    "dropout": replace(BASE, dropout=0.5),
    "recompute": replace(BASE, recompute=True),
    "no dout": replace(BASE, dout=False, dlse=True),
    **{f"given d{name}": replace(BASE, given=name) for name in "qkv"},
    **{f"address of {name}": replace(BASE, moved=name, given="qkv") for name in SIX},
    **{f"strides of {name}": replace(BASE, padded=name, given="qkv") for name in SIX},
    **{f"order of {name}": replace(BASE, turned=name, given="qkv") for name in SIX},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_request_that_differs_in_one_thing_has_its_own_plan(gpu: FakeGpu, change: str):
    other = CHANGES[change]
    base = replace(BASE, given=other.given if len(other.given) > 1 else "")
    for asked in (base, other):
        asked.check()
    count = 7 if other.recompute else 6
    assert gpu.repeated == [False] * count, "they share a plan"
    for seed, asked in enumerate((other, base, base, other)):
        asked.check(seed, runs=2)
    assert all(gpu.repeated[count:])
    assert len(store._plans) == 2


@pytest.mark.parametrize(
    "other",
    [replace(PACKED, longest=(30, 20)), replace(PACKED, longest=(12, 30)), replace(PACKED, batch=1), replace(PACKED, given="k")],
    ids=["longest_q", "longest_k", "sequences", "given dk"],
)
def test_packed_requests_have_their_own_plans(gpu: FakeGpu, other: Asked):
    for asked in (PACKED, other):
        asked.check()
    assert not any(gpu.repeated)
    for asked in (other, PACKED):
        asked.check(1)
    assert all(gpu.repeated[6:])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spare", [0, 3])
def test_offsets_are_read_on_the_device_and_spare_rows_get_zeros(gpu: FakeGpu, spare: int, recompute: bool):
    sequences = replace(PACKED, recompute=recompute, learned_sink=True, mask=fa.MaskKind.causal(), dlse=True)
    sequences.check()
    replace(sequences, spare=spare).check(1)
    assert len(store._plans) == 1


def test_a_dlse_is_an_address_and_no_more(gpu: FakeGpu):
    for seed, dlse in enumerate((False, True, False, True)):
        replace(BASE, dlse=dlse, learned_sink=True).check(seed)
    assert gpu.repeated == [False] * 3 + [True] * 9


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_takes_the_seed_of_its_request(gpu: FakeGpu, recompute: bool, packed: bool):
    asked = replace(PACKED if packed else BASE, recompute=recompute, dropout=0.5)
    for seed in range(2):
        request = asked.check(seed)
        assert gpu.launches[-2][1].fwd.rng == request.options.rng.ptr
    replace(asked, dropout=0.25).check()
    steps = 4 if recompute else 3
    assert gpu.repeated == [False] * steps + [True] * steps + [False] * steps


def test_three_kernels_run_in_order_on_the_arrays_of_now(gpu: FakeGpu):
    asked = replace(BASE, learned_sink=True, dlse=True, given="qkv")
    for seed, stream in ((0, None), (1, 5), (2, None)):
        request = asked.check(seed, stream=stream)
        assert headers(gpu)[-3:] == THREE
        assert [launch[2] for launch in gpu.launches[-3:]] == [stream or 1] * 3, "1: the stream of a library that has none"
        start = gpu.workspaces[-1][0]
        for _, p, _ in gpu.launches[-3:]:
            assert (p.statistics, p.dq_sum % 256, p.dq_sum > p.statistics) == (start, 0, True)
            assert [p.dout, p.dlse, p.fwd.o, p.fwd.lse] == [each.ptr for each in (request.dout, request.dlse, request.out, request.lse)]
            assert [p.dq, p.dk, p.dv] == [info.ptr for info in request.gradient_arrays]
            assert [p.fwd.q, p.fwd.k, p.fwd.v, p.fwd.learned_sink] == [
                each.ptr for each in (request.q, request.k, request.v, request.options.learned_sink)
            ]


@pytest.mark.parametrize("asked", [BASE, PACKED, replace(BASE, recompute=True), replace(BASE, head_dim=8, heads=1, heads_kv=1)])
def test_statistics_of_rows_lie_in_a_dq_that_the_call_makes(gpu: FakeGpu, asked: Asked):
    """One float32 a row less at the peak than the statistics beside the LSE take."""
    asked.check(runs=2)
    for _, p, _ in gpu.launches[-3:]:
        assert p.statistics == p.dq


@pytest.mark.parametrize("asked", [replace(BASE, given="q"), replace(BASE, learned_sink=True), replace(PACKED, given="q")])
def test_statistics_lie_in_the_workspace_where_dq_is_the_callers_or_a_sink_reads_them_late(gpu: FakeGpu, asked: Asked):
    asked.check(runs=2)
    for _, p, _ in gpu.launches[-3:]:
        assert p.statistics == gpu.workspaces[-1][0] != p.dq


def test_with_recompute_the_forward_runs_first_into_the_workspace(gpu: FakeGpu):
    request = replace(BASE, recompute=True).check()
    assert headers(gpu) == ["fa2_fwd", *THREE]
    forward, *others = (launch[1] for launch in gpu.launches)
    (start, _) = gpu.workspaces[-1]
    assert forward.q == request.q.ptr
    assert (start, len({start, forward.o, forward.lse})) == (others[0].dq_sum, 3)
    assert {(p.fwd.o, p.fwd.lse) for p in others} == {(forward.o, forward.lse)}
    assert len({launch[2] for launch in gpu.launches}) == 1


def test_on_hopper_the_forward_that_runs_first_is_that_of_a_forward_call(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch_arch, "_arch_of_gpu", lambda _: fa.SmArch.SM_90A)
    asked = replace(BASE, head_dim=64, v_head_dim=64, recompute=True)
    asked.check(runs=2)
    assert headers(gpu) == ["fa3_fwd", *THREE] * 2
    assert {spec.family for spec, *_ in gpu.launches[1:4]} == {Family.FA2}


def test_a_workspace_is_told_of_where_another_stream_uses_it(gpu: FakeGpu):
    BASE.check()
    assert ([told for _, told in gpu.workspaces], gpu.used_on) == ([False], [])
    BASE.check(1, stream=5)
    start, told = gpu.workspaces[-1]
    assert (told, gpu.used_on) == (True, [(start, 5)])


def test_torch_is_told_before_a_launch_that_may_fail(gpu: FakeGpu):
    request = BASE.request(BASE.on_card(BASE.arrays()))
    gpu.status = 701
    with pytest.raises(fa.LaunchError):
        fa.run(request, stream=5)
    assert gpu.used_on == [(gpu.workspaces[-1][0], 5)]


def test_a_workspace_for_another_stream_is_one_that_waits_when_it_is_freed(monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    monkeypatch.setattr(new.DeviceArray, "empty", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(new, "read_array", lambda array, _: array)
    like = FakeArray(np.zeros(4, np.float16), 1).info()
    new.empty_workspace(like, 6, other_stream=True)
    assert made == [((2,), "float32", 1)]


def test_the_arrays_of_a_plan_that_other_strides_do_not_fit(gpu: FakeGpu):
    """As the actor has it: arrays that were made by one thread are written by another."""
    arrays = BASE.arrays()
    expected = fa.run(BASE.request(arrays))
    request = BASE.request(BASE.on_card(arrays))
    for turned in (False, False, True, True, False):
        outputs = gradients.make_gradients(request)
        if turned:
            other = replace(BASE, turned="dq")._placed("dq", np.zeros_like(arrays["q"]), 0)
            outputs = replace(outputs, gradients=(other, *outputs.gradients[1:]))
        gradients.fill_gradients(request, outputs, stream=9)
        np.testing.assert_allclose(on_host(outputs.gradients[0]), expected.dq, rtol=2e-2, atol=4e-3)
        assert gpu.launches[-1][2] == 9
    assert gpu.repeated == [again for again in (False, True, False, True, False) for _ in range(3)]
    assert not gpu.used_on, "whoever makes them keeps them"


def test_what_no_kernel_does_allocates_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    request = BASE.request(BASE.on_card(BASE.arrays()))
    refused = fa.FeatureNotBuiltError("that", "not built")

    def refuse(_: Any) -> None:
        raise refused

    def allocate(*_: Any, **__: Any) -> None:
        pytest.fail("something was allocated")

    monkeypatch.setattr(gradients, "lookup", refuse)
    for name in ("empty_like_framework", "empty_workspace"):
        monkeypatch.setattr(gradients, name, allocate)
    with pytest.raises(fa.FeatureNotBuiltError) as caught:
        fa.run(request)
    assert caught.value is refused


EMPTY: dict[str, tuple[Asked, list[str]]] = {
    "no keys": (replace(BASE, seqlen_k=0), ["bwd_preprocess", "bwd_postprocess"]),
    "no keys and a sink": (replace(BASE, seqlen_k=0, learned_sink=True, dlse=True), ["bwd_preprocess", "bwd_postprocess"]),
    "no rows": (replace(BASE, seqlen_q=0), ["fa2_bwd"]),
    "no rows and a sink": (replace(BASE, seqlen_q=0, learned_sink=True), ["fa2_bwd", "bwd_postprocess"]),
    "no batch": (replace(BASE, batch=0), []),
    "no batch and a sink": (replace(BASE, batch=0, learned_sink=True), ["bwd_postprocess"]),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_kernels_without_work_are_not_launched(gpu: FakeGpu, name: str, recompute: bool):
    asked, kernels = EMPTY[name]
    runs_forward = recompute and asked.seqlen_q and asked.batch
    replace(asked, recompute=recompute).check(runs=2)
    assert headers(gpu) == [*(["fa2_fwd"] if runs_forward else []), *kernels] * 2


def test_borrowed_tiles_neither_find_nor_leave_a_plan(gpu: FakeGpu):
    asked = replace(BASE, head_dim=128, v_head_dim=128)
    for tiles_for in (fa.SmArch.SM_86, None, fa.SmArch.SM_86, None):
        asked.check(tiles_for=tiles_for)
    assert gpu.repeated == [False] * 9 + [True] * 3


@pytest.fixture
def in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    env.settings.cache_clear()
    yield
    monkeypatch.undo()
    env.settings.cache_clear()


@pytest.mark.usefixtures("in_debug_mode")
def test_debug_makes_no_plan(gpu: FakeGpu):
    BASE.check(runs=2)
    assert gpu.repeated == [False] * 6


def test_the_environment_may_refuse_though_there_is_a_plan(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    request = BASE.check()
    monkeypatch.setattr(backend, "settings", lambda: replace(env.Settings.from_environ({}), backend="cpu"))
    with pytest.raises(fa.DeviceMismatchError, match="BACKEND=cpu"):
        fa.run(request)
    assert len(gpu.launches) == 3


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv"])
def test_an_array_that_lies_elsewhere_is_noticed(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(staleness._readers, FakeArray, lambda array: (array.array.ctypes.data, array.array.shape))
    asked = replace(BASE, dlse=True, given="qkv")
    request = asked.request({each: None if x is None else FakeArray(x).info() for each, x in asked.arrays().items()})
    fa.run(request)
    source = getattr(request, name).source
    source.array = source.array.copy()
    with pytest.raises(fa.StaleArrayError, match=f"^{name}: its memory changed since the request was made"):
        fa.run(request)
    assert len(gpu.launches) == 3


def test_a_request_has_its_key_and_a_changed_one_its_own(gpu: FakeGpu):
    arrays = BASE.arrays()
    request = BASE.request(BASE.on_card(arrays))
    assert request.plan_key == BASE.request(BASE.on_card(arrays)).plan_key == replace(request).plan_key
    assert request.plan_key[0] is fa.Fa2BwdRequest
    for change in ({"mask": fa.MaskKind.causal()}, {"deterministic": True}, {"recompute": True, "out": None, "lse": None}):
        assert replace(request, **change).plan_key not in {None, request.plan_key}
    assert BASE.request(arrays).plan_key is None, "the CPU backend has no plans"

    class Own(fa.Fa2BwdRequest):
        """Its kernels may be any."""

    own = replace(BASE, kind=Own)
    assert own.request(own.on_card(arrays)).plan_key is None
    own.check(runs=2)
    assert not any(gpu.repeated)
    assert not store._plans


def test_another_device_has_its_own_plan(gpu: FakeGpu):
    arrays = BASE.arrays()
    for _ in range(2):
        for index in (0, 1):
            fa.run(BASE.request(BASE.on_card(arrays, index)))
    assert gpu.repeated == [False] * 6 + [True] * 6
