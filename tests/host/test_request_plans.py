"""Plans, on a fake GPU: a repeated run is right whatever was run before it, and makes no key, lookup or parameters anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn import env  # noqa: E402
from atomr_accel_flashattn.arrays.read import read_array  # noqa: E402
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.launch import launcher as launch  # noqa: E402
from atomr_accel_flashattn.launch.driver import DeviceProperties  # noqa: E402
from atomr_accel_flashattn.requests.dense import DenseFwdRequest  # noqa: E402
from atomr_accel_flashattn.runtime import backend, execute, plan as store  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, fresh_hooks  # noqa: E402

from .calls import (  # noqa: E402
    CHANGES as CHANGES_OF_NUMBERS,
    Call,
    host,
)

pytestmark = pytest.mark.torch

BASE = Call(head_dim=64, v_head_dim=64)
KINDS = (DenseFwdRequest, fa.Fa2FwdRequest, fa.Fa3FwdRequest)
CHANGES: dict[str, dict[str, Any]] = {
    **CHANGES_OF_NUMBERS,
    "head_dim": {"head_dim": 32},
    "v_head_dim": {"v_head_dim": 32},
    "v_head_dim_of_the_same_strides": {"v_head_dim": 32, "pad": 32, "moved": "v"},
}


@pytest.fixture(params=[False, True], ids=["outputs are read", "outputs are known"])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeGpu:
    """With so few multiprocessors that kernels of the FA3 family are persistent, which need the counters of their stream."""
    fresh_hooks(monkeypatch)
    meet_torch()
    if request.param:
        hooks.plain_types = frozenset({FakeCuda})
    card = FakeGpu(DeviceProperties("Fake", (9, 0), 3, 1 << 30))
    card.install(monkeypatch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return card


@pytest.fixture
def in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    env.settings.cache_clear()
    yield
    monkeypatch.undo()
    env.settings.cache_clear()


@dataclass(frozen=True)
class Asked:
    """What a :class:`Call` says, as requests on the fake GPU and in host memory."""

    call: Call = BASE
    kind: Any = DenseFwdRequest
    dropout: float = 0.0
    longest: tuple[int, int] = (20, 20)  # what packed requests say of their sequences, of q and of k
    more: tuple[tuple[str, Any], ...] = ()

    def request(self, wrap: Any) -> Any:
        c, generator = self.call, torch.Generator().manual_seed(self.call.seed)
        q = c.tensor(0, c.seqlen_q, c.heads, c.head_dim)
        k, v = (c.tensor(i, c.seqlen_k, c.heads_kv, width) for i, width in ((1, c.head_dim), (2, c.v_head_dim)))
        packing, kind, out_shape = {}, self.kind, (*q.shape[:-1], c.v_head_dim)
        if c.packed:
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            ends = [torch.tensor([0, c.split, x.shape[0]], dtype=torch.int32) for x in (q, k)]
            lengths = [fa.CumulativeSeqlens(wrap(each), longest) for each, longest in zip(ends, self.longest, strict=True)]
            packing, kind = {"cu_seqlens_q": lengths[0], "cu_seqlens_k": lengths[1]}, fa.VarlenFwdRequest
            out_shape = (*q.shape[:-1], c.v_head_dim)
        slopes = wrap(torch.rand((c.batch, c.heads)[2 - c.slopes :], generator=generator)) if c.slopes else None
        return kind(
            *map(wrap, (q, k, v)),
            mask=replace(fa.MaskKind.window(*c.window), right=0) if c.causal else fa.MaskKind.window(*c.window),
            bias=fa.PositionBias(slopes),
            sink_tokens=c.sink_tokens,
            options=fa.AttentionOptions(
                softmax_scale=c.scale,
                softcap=c.softcap,
                learned_sink=wrap(torch.rand(c.heads, generator=generator)) if c.learned_sink else None,
                dropout_p=self.dropout,
                rng=wrap(torch.tensor([c.seed, 4])) if self.dropout else None,
            ),
            out=wrap(torch.full(out_shape, torch.nan, dtype=q.dtype)) if c.out else None,
            **packing,
            **(dict(self.more) if wrap is fake else {}),
        )

    def check(self, seed: int = 0, runs: int = 1, **options: Any) -> None:
        """Every run of one request on the fake GPU, which judges its parameters, gives what the CPU backend gives."""
        asked = replace(self, call=replace(self.call, seed=seed))
        request = asked.request(fake)
        expected = fa.run(replace(asked, kind=DenseFwdRequest).request(lambda tensor: tensor))
        for _ in range(runs):
            made = fa.run(request, **options)
            assert request.out is None or made.out is request.out
            np.testing.assert_allclose(host(made.out), host(expected.out), rtol=1e-2, atol=2e-3)
            assert (made.lse is None) is (options.get("lse") is False)
            if made.lse is not None:
                np.testing.assert_allclose(host(made.lse), host(expected.lse), rtol=1e-3, atol=1e-3)


def check_apart(gpu: FakeGpu, base: Asked, other: Asked) -> None:
    base.check()
    other.check()
    assert gpu.repeated == [False, False], "they share a plan"
    for seed, asked in enumerate((base, other, base, base, other)):
        asked.check(seed, runs=2)
    assert gpu.repeated[2:] == [True] * 10


@pytest.mark.parametrize("kind", [fa.Fa2FwdRequest, fa.Fa3FwdRequest])
@pytest.mark.parametrize("change", CHANGES)
def test_a_request_that_differs_in_one_thing_has_its_own_plan(gpu: FakeGpu, change: str, kind: Any):
    check_apart(gpu, Asked(kind=kind), Asked(replace(BASE, **CHANGES[change]), kind))


PACKED = replace(BASE, packed=True)


@pytest.mark.parametrize(
    "other",
    [
        Asked(BASE),
        Asked(replace(PACKED, seqlen_q=6)),
        Asked(replace(PACKED, seqlen_k=10)),
        Asked(PACKED, longest=(30, 20)),
        Asked(PACKED, longest=(20, 30)),
        Asked(replace(PACKED, window=(2, 0))),
        Asked(replace(PACKED, slopes=2)),
        Asked(replace(PACKED, out=True)),
    ],
    ids=str,
)
def test_packed_requests_have_their_own_plans(gpu: FakeGpu, other: Asked):
    check_apart(gpu, Asked(PACKED), other)


def test_offsets_are_read_on_the_device_by_every_run(gpu: FakeGpu):
    for split in (1, 4, 0, 3):
        Asked(replace(PACKED, split=split)).check(seed=split)
    assert gpu.repeated == [False, True, True, True]


def test_dropout_takes_the_seed_of_its_request(gpu: FakeGpu):
    check_apart(gpu, Asked(dropout=0.5), Asked(dropout=0.25))
    Asked().check()
    assert not gpu.repeated[-1]


def test_classes_of_requests_share_no_plan(gpu: FakeGpu):
    for seed in range(3):
        for kind in KINDS:
            Asked(kind=kind).check(seed)
    assert gpu.repeated == [False] * 3 + [True] * 6
    assert [spec.family for spec, *_ in gpu.launches[3:6]] == [Family.FA3, Family.FA2, Family.FA3]


def test_the_way_tiles_are_handed_out_is_part_of_the_key(gpu: FakeGpu):
    modes = [fa.PersistentMode.auto(), fa.PersistentMode.Grid(), *map(fa.PersistentMode.Persistent, (None, 1, 2))]
    for seed in range(3):
        for mode in modes:
            Asked(kind=fa.Fa3FwdRequest, more=(("persistent", mode),)).check(seed)
    assert gpu.repeated == [False] * 5 + [True] * 10
    assert gpu.grids == [3, 4, 3, 1, 2] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_run_takes_the_addresses_and_the_stream_of_now(gpu: FakeGpu, kind: Any):
    Asked(kind=kind).check()
    for seed, stream in ((1, None), (2, 5), (3, 6), (4, 5), (5, None)):
        Asked(kind=kind).check(seed, stream=stream)
        assert gpu.launches[-1][2] == (stream or STREAM)
        assert gpu.repeated[-1]
    request = replace(Asked(kind=kind), call=replace(BASE, learned_sink=True)).request(fake)
    for output in (fa.run(request), fa.run(request)):
        p, sink = gpu.last, request.options.learned_sink
        addresses = [x.data_ptr() for x in (request.q, request.k, request.v, sink)]
        assert [p.q, p.k, p.v, p.learned_sink] == addresses
        assert (output.out.shape, output.lse.shape) == ((2, 5, 4, 64), (2, 4, 5))
    assert (p.o, p.lse) == (output.out.data_ptr(), output.lse.data_ptr())


def test_every_run_asks_for_the_counters_of_its_stream(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    """The stream may be captured by now, and be another one under the same handle; the fake looks at what the kernel was given."""
    asked: list[int] = []

    def counters_for(_index: int, stream: int) -> int:
        asked.append(stream)
        gpu.counters[stream] = 4096 + 8 * len(asked)
        return gpu.counters[stream]

    monkeypatch.setattr(launch, "counters_for", counters_for)
    Asked(kind=fa.Fa3FwdRequest).check(runs=3)
    Asked(kind=fa.Fa3FwdRequest).check(runs=2, stream=5)
    assert asked == [STREAM] * 3 + [5] * 2
    assert gpu.launches[-1][0].tile.persistent


def test_an_lse_is_written_only_by_runs_that_want_it(gpu: FakeGpu):
    for seed, lse in enumerate((True, False, True, False)):
        Asked().check(seed, lse=lse)
        assert (gpu.last.lse is not None) is lse
    assert gpu.repeated == [False, True, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_an_out_of_other_strides_or_alignment_has_its_own_plan(gpu: FakeGpu, kind: Any):
    q, k, v = Asked().request(fake).problem.q.source, *(Asked().request(fake).problem.k.source,) * 2
    plain = torch.empty(2, 5, 4, 64).half()
    outs = {
        "plain": plain,
        "heads first": torch.empty(2, 4, 5, 64).half().transpose(1, 2),
        "padded": torch.empty(2, 5, 4, 72).half()[..., :64],
        "odd": torch.empty(2 * 5 * 4 * 64 + 1).half()[1:].view(2, 5, 4, 64),
    }
    expected = host(fa.run(DenseFwdRequest(*(x.as_subclass(torch.Tensor) for x in (q, k, v)))).out)
    for _ in range(3):
        for out in outs.values():
            fa.run(kind(q, k, v, out=fake(out)))
            np.testing.assert_allclose(host(out), expected, rtol=1e-2, atol=2e-3)
            out.fill_(torch.nan)
    assert gpu.repeated == [False] * 4 + [True] * 8


def test_fill_repeats_launches_into_arrays_that_are_there(gpu: FakeGpu):
    """As the actor does. An output that was made with other strides than that of the plan gets a launch of its own."""
    request = Asked().request(fake)
    expected = host(fa.run(Asked().request(lambda tensor: tensor)).out)
    other = read_array(fake(torch.empty(2, 4, 5, 64).half().transpose(1, 2)), "out")
    for turned in (False, False, True, True, False, False):
        outputs = execute.make_outputs(request, lse=False)
        outputs = replace(outputs, out=other) if turned else outputs
        execute.fill(request, outputs, stream=9)
        np.testing.assert_allclose(host(outputs.out.source), expected, rtol=1e-2, atol=2e-3)
        assert gpu.launches[-1][2] == 9
    assert gpu.repeated == [False, True, False, True, False, True]


def test_a_class_of_the_caller_leaves_no_plan(gpu: FakeGpu):
    class Own(fa.Fa2FwdRequest):
        """Its kernel may be any."""

    for _ in range(2):
        Asked(kind=Own).check()
    assert Asked(kind=Own).request(fake).plan_key is None
    assert gpu.repeated == [False] * 2
    assert not store._plans


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_with_the_dropout_pattern_has_two_launches(gpu: FakeGpu, kind: Any, packed: bool):
    asked = Asked(replace(BASE, packed=packed), kind, dropout=0.5)
    for seed in range(2):
        request = replace(asked, call=replace(asked.call, seed=seed)).request(fake)
        assert fa.run(request, dropout_mask=True).dropout_mask.all()
        outputs = execute.make_outputs(request, lse=False, dropout_mask=True)
        execute.fill(request, outputs)
        assert outputs.for_user(request).dropout_mask.all()
        assert gpu.last.rng == request.options.rng.data_ptr()
    assert gpu.repeated == [False] * 2 + [True] * 6
    assert [spec.kernel_name.startswith("dropout_mask") for spec, *_ in gpu.launches] == [False, True] * 4
    (plan,) = store._plans.values()
    assert len(plan.launches) == 2
    asked.check()
    assert len(store._plans) == 2, "without the pattern it is another plan"
    assert gpu.repeated[-1] is False


def test_without_dropout_the_pattern_changes_nothing(gpu: FakeGpu):
    request = Asked().request(fake)
    fa.run(request)
    assert fa.run(request, dropout_mask=True).dropout_mask is None
    assert gpu.repeated == [False, True]


def test_the_first_run_takes_the_way_of_all_later_ones(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    launched: list[Any] = []
    launch_now = launch.Launch.launch

    def noted(made: launch.Launch, *arguments: Any) -> None:
        launched.append(made)
        launch_now(made, *arguments)

    monkeypatch.setattr(launch.Launch, "launch", noted)
    for kind in (fa.Fa2FwdRequest, fa.Fa3FwdRequest):
        Asked(kind=kind).check(runs=3)
        (plan,) = (plan for key, plan in store._plans.items() if key[0][0] is kind)
        assert launched[-3:] == [*plan.launches] * 3


def attributes_of(request: Any) -> dict[str, Any]:
    """Of a request and of its problem: the objects themselves, and what a shallow look at them shows."""
    found = {each.name: getattr(request, each.name) for each in fields(request)}
    problem = {each.name: getattr(request.problem, each.name) for each in fields(request.problem)}
    return {"ids": {name: id(value) for name, value in {**found, **problem}.items()}, "problem": repr(problem), "key": found["plan_key"]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_never_written_to(gpu: FakeGpu, kind: Any, packed: bool):
    request = Asked(replace(BASE, packed=packed, out=True), kind, dropout=0.5).request(fake)
    before = attributes_of(request)
    for options in ({}, {"lse": False}, {"dropout_mask": True}, {"stream": 5}):
        fa.run(request, **options)
        assert attributes_of(request) == before
    outputs = execute.make_outputs(request, lse=True)
    execute.fill(request, outputs)
    assert attributes_of(request) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_that_was_used_is_in_the_output_and_gives_the_same_again(gpu: FakeGpu, kind: Any):
    on_card = [fake(BASE.tensor(number, 5, 4, 64)) for number in range(3)]
    torch.manual_seed(3)
    drawn = kind(*on_card, options=fa.AttentionOptions(dropout_p=0.5))
    first = fa.run(drawn)
    assert (first.rng.shape, first.rng.dtype) == ((2,), torch.int64)
    assert gpu.last.rng == first.rng.data_ptr()
    again = fa.run(kind(*on_card, options=fa.AttentionOptions(dropout_p=0.5, rng=first.rng)))
    assert again.rng is first.rng
    np.testing.assert_array_equal(host(again.out), host(first.out))
    other = fa.run(kind(*on_card, options=fa.AttentionOptions(dropout_p=0.5)))
    assert not torch.equal(other.rng, first.rng)
    assert not torch.equal(other.out, first.out)
    assert fa.run(kind(*on_card)).rng is None
    on_cpu = [x.as_subclass(torch.Tensor) for x in (*on_card, first.rng)]
    expected = fa.run(kind(*on_cpu[:3], options=fa.AttentionOptions(dropout_p=0.5, rng=on_cpu[3])))
    assert expected.rng is on_cpu[3]
    np.testing.assert_allclose(host(first.out), host(expected.out), rtol=1e-2, atol=2e-3)


def test_borrowed_tiles_neither_find_nor_leave_a_plan(gpu: FakeGpu):
    asked = Asked(replace(BASE, head_dim=128, v_head_dim=128), kind=fa.Fa2FwdRequest)
    for tiles_for in (fa.SmArch.SM_86, None, fa.SmArch.SM_86, None):
        asked.check(tiles_for=tiles_for)
    assert gpu.repeated == [False, False, False, True]
    assert gpu.launches[2][0].tile == gpu.launches[0][0].tile


@pytest.mark.parametrize("mode", [fa.PersistentMode.Grid(), fa.PersistentMode.Persistent(), fa.PersistentMode.Persistent(2)], ids=str)
def test_borrowed_tiles_are_those_of_mma_sync_whatever_the_request_says(gpu: FakeGpu, mode: fa.PersistentMode):
    Asked(kind=fa.Fa3FwdRequest, more=(("persistent", mode),)).check(tiles_for=fa.SmArch.SM_86)
    spec = gpu.launches[-1][0]
    assert (spec.family, spec.tile) == (Family.FA2, fa.lookup(fa.DispatchKey(fa.SmArch.SM_86, fa.DType.F16, 64)).tile)


@pytest.mark.usefixtures("in_debug_mode")
def test_debug_makes_no_plan(gpu: FakeGpu):
    Asked().check(runs=2)
    assert gpu.repeated == [False, False]


def test_debug_makes_no_plan_of_a_request_that_had_one(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    request = Asked().request(fake)
    fa.run(request)
    in_debug = replace(env.Settings.from_environ({}), debug=True)
    monkeypatch.setattr(store, "settings", lambda: in_debug)
    fa.run(request)
    assert gpu.repeated == [False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_made_with_its_key_and_its_copies_with_theirs(gpu: FakeGpu, kind: Any):
    request = Asked(kind=kind).request(fake)
    assert request.plan_key == Asked(kind=kind).request(fake).plan_key == replace(request).plan_key
    assert request.plan_key[0] is kind
    other = replace(request, mask=fa.MaskKind.causal())
    assert other.plan_key not in {None, request.plan_key}
    assert Asked(kind=kind).request(lambda tensor: tensor).plan_key is None, "the CPU backend has no plans"
    assert not gpu.launches


def test_a_run_that_is_refused_by_its_environment_is_refused_though_there_is_a_plan(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    request = Asked().request(fake)
    fa.run(request)
    outputs = execute.make_outputs(request, lse=True)
    monkeypatch.setattr(backend, "settings", lambda: replace(env.Settings.from_environ({}), backend="cpu"))
    with pytest.raises(fa.DeviceMismatchError, match="BACKEND=cpu"):
        fa.run(request)
    with pytest.raises(fa.DeviceMismatchError, match="BACKEND=cpu"):
        execute.fill(request, outputs)
    assert len(gpu.launches) == 1


def test_another_device_has_its_own_plan(gpu: FakeGpu):
    for seed in range(2):
        for index in (0, 1):
            tensors = [fake(BASE.tensor(number, 5, 4, 64)) for number in range(3)]
            for tensor in tensors:
                tensor.index = index
            fa.run(fa.Fa3FwdRequest(*tensors), lse=bool(seed))
            assert gpu.launches[-1][2] == STREAM + index
    assert gpu.repeated == [False, False, True, True]


def test_empty_outputs_launch_nothing_and_no_keys_are_a_launch_like_any_other(gpu: FakeGpu):
    q, k = fake(torch.randn(2, 5, 4, 64).half()), fake(torch.empty(2, 0, 4, 64).half())
    for _ in range(2):
        assert fa.run(fa.Fa3FwdRequest(k, q, q)).out.shape == k.shape
    assert not gpu.launches
    for _ in range(2):
        output = fa.run(fa.Fa3FwdRequest(q, k, k))
        assert (output.out == 0).all()
        assert torch.isneginf(output.lse).all()
    assert gpu.repeated == [False, True]


def test_the_number_of_plans_is_bounded_and_all_can_be_forgotten(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MAX_PLANS", 3)
    for length in (*range(1, 9), 8):
        Asked(replace(BASE, seqlen_q=length)).check()
        assert len(store._plans) <= 3
    assert gpu.repeated == [False] * 8 + [True]
    repeat.clear()
    Asked(replace(BASE, seqlen_q=8)).check()
    assert not gpu.repeated[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_plans_and_get_their_own_answers(gpu: FakeGpu, kind: Any):
    failed: list[int] = []

    def work(seed: int) -> None:
        try:
            for _ in range(10):
                Asked(kind=kind).check(seed, stream=100 + seed)
        except BaseException:
            failed.append(seed)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sum(gpu.repeated) >= 36
