"""The operators of torch, again: on a fake GPU, with the numbers of the first time, and without a request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.torch_ops import first_call, kernels, repeat  # noqa: E402
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import FakeCuda, fake, note_requests, take_for_cuda  # noqa: E402

pytestmark = pytest.mark.torch

operators = torch.ops.atomr_accel_flashattn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    take_for_cuda(monkeypatch, STREAM)
    card = FakeGpu()
    card.install(monkeypatch, fa.SmArch.SM_90)
    return card


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those on the fake card."""
    return note_requests(monkeypatch, FakeCuda)


@dataclass(frozen=True)
class Call:
    """Operands; tensors are drawn anew by every :meth:`both`."""

    packed: bool = False
    more: tuple[str, ...] = ()  # learned_sink, alibi_slopes, dlse
    without_dout: bool = False
    equal_offsets: bool = True
    numbers: tuple[tuple[str, Any], ...] = ()
    wide: str = ""  # the operand that lies in a wider one
    odd: str = ""  # the operand at an odd address
    columns_first: str = ""  # the operand whose last stride is not 1

    def tensors(self) -> dict[str, Any]:
        sizes = (12,) if self.packed else (2, 6)
        made: dict[str, Any] = {name: torch.randn(*sizes, heads, 16).half() for name, heads in zip("qkv", (4, 2, 2), strict=True)}
        made["dout"] = None if self.without_dout else torch.randn(*sizes, 4, 16).half()
        made["dlse"] = torch.randn(*((4, 12) if self.packed else (2, 4, 6))) if "dlse" in self.more else None
        for name in ("learned_sink", "alibi_slopes"):
            made[name] = torch.rand(4) if name in self.more else None
        made["rng"] = torch.randint(1 << 40, (2,)) if dict(self.numbers).get("dropout_p") else None
        made["cu_seqlens_q"] = made["cu_seqlens_k"] = torch.tensor([0, 5, 12], dtype=torch.int32) if self.packed else None
        if self.packed and not self.equal_offsets:
            made["cu_seqlens_k"] = torch.tensor([0, 4, 11], dtype=torch.int32)
        return {name: self.laid_out(name, x) for name, x in made.items()}

    def laid_out(self, name: str, x: Any) -> Any:
        if name == self.wide:
            return torch.nn.functional.pad(x, (0, 8))[..., : x.shape[-1]]
        if name == self.odd:
            room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
            return room.copy_(x)
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if name == self.columns_first else x

    def run(self, tensors: dict[str, Any]) -> list[Any]:
        """O, LSE and all gradients."""
        tensors = dict(tensors)
        dout, dlse = tensors.pop("dout"), tensors.pop("dlse")
        lengths = {"max_seqlen_q": 7, "max_seqlen_k": 7} if self.packed else {}
        operands = tensors | lengths | dict(self.numbers)
        out, lse, pattern = operators.attention(**operands)
        gradients = operators.attention_backward(dout, dlse, out, lse, **operands)
        assert pattern.numel() == 0
        return [out, lse, *gradients]

    def check(self) -> None:
        """On the fake card, against the CPU backend."""
        host = self.tensors()
        seen: dict[int, Any] = {}
        card = {name: x if x is None else seen.setdefault(id(x), fake(x)) for name, x in host.items()}
        for made, right in zip(self.run(card), self.run(host), strict=True):
            torch.testing.assert_close(made.as_subclass(torch.Tensor), right, rtol=1e-2, atol=1e-2)


CALLS = [
    Call(),
    Call(numbers=(("window_right", 0), ("softcap", 2.0), ("softmax_scale", 0.3))),
    Call(numbers=(("dropout_p", 0.5),)),
    Call(numbers=(("deterministic", True),)),
    Call(more=("dlse",)),
    Call(more=("dlse",), without_dout=True),
    Call(more=("learned_sink",)),
    Call(more=("alibi_slopes", "learned_sink", "dlse"), numbers=(("window_left", 3), ("window_right", 0), ("sink_tokens", 1))),
    Call(packed=True, numbers=(("window_right", 0),)),
    Call(packed=True, equal_offsets=False),
    Call(packed=True, more=("alibi_slopes", "learned_sink", "dlse"), numbers=(("dropout_p", 0.3),)),
    Call(wide="q"),
    Call(wide="dout"),
    Call(odd="dout"),
    Call(odd="k"),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_second_step_makes_no_request(gpu: FakeGpu, asked: list[str], call: Call):
    torch.manual_seed(0)
    call.check()
    assert asked == ["forward", "backward", "forward"], "a backward request makes one of its forward"
    asked.clear()
    launched = len(gpu.launches)
    for _ in range(3):
        call.check()
    assert asked == []
    assert gpu.repeated == [False] * launched + [True] * 3 * launched
    assert {stream for *_, stream in gpu.launches} == {STREAM}


def test_calls_do_not_share_what_they_leave(gpu: FakeGpu):
    torch.manual_seed(1)
    for call in [*CALLS, *reversed(CALLS), *CALLS]:
        call.check()
    assert gpu.launches


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_has_to_be_copied_leaves_nothing(gpu: FakeGpu, asked: list[str], name: str, monkeypatch: pytest.MonkeyPatch):
    for module, copying in ((kernels, "rows_contiguous"), (kernels, "usual_rows"), (first_call, "usual_rows")):
        copy = getattr(module, copying)  # an operator's kernel makes plain tensors, which are in host memory: they go back to the card
        monkeypatch.setattr(module, copying, lambda x, copy=copy: fake(copy(x)) if isinstance(x, FakeCuda) else copy(x))
    call = Call(columns_first=name)
    for _ in range(2):
        asked.clear()
        call.check()
        assert "backward" in asked
    assert gpu.launches


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_seqlen_q", 8),
        ("max_seqlen_k", 8),
        ("softmax_scale", 0.3),
        ("window_left", 4),
        ("window_right", 1),
        ("softcap", 2.0),
        ("dropout_p", 0.25),
        ("sink_tokens", 2),
    ],
)
def test_each_number_is_told_apart(gpu: FakeGpu, asked: list[str], name: str, value: Any):
    numbers = {"window_left": 3, "window_right": 0, "sink_tokens": 1, "dropout_p": 0.5}
    call = Call(packed=True, numbers=tuple(numbers.items()))
    call.check()
    asked.clear()
    changed = Call(packed=True, numbers=tuple((numbers | {name: value}).items()))
    changed.check()
    assert asked == ["forward", "backward", "forward"]
    asked.clear()
    call.check()
    changed.check()
    assert asked == []
    assert gpu.launches


def test_torch_may_ask_for_equal_bits_in_between(gpu: FakeGpu):
    def deterministic() -> set[bool]:
        gpu.launches.clear()
        Call().check()
        return {spec.deterministic for spec, *_ in gpu.launches if spec.HEADER == "fa2_bwd"}

    assert deterministic() == {False}
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic() == deterministic() == {True}
    finally:
        torch.use_deterministic_algorithms(False)
    assert deterministic() == {False}


def test_a_functional_call_does_not_find_what_an_operator_left(gpu: FakeGpu):
    """With dropout it has to draw a seed, and with its pattern to make that."""
    call = Call(numbers=(("dropout_p", 0.5),))
    call.check()
    tensors = call.tensors()
    q, k, v = (fake(tensors[name]) for name in "qkv")
    made = []
    for _ in range(3):
        made.append(fa.flash_attn_func(q, k, v, 0.5).as_subclass(torch.Tensor))
        assert fa.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)[2] is not None
    assert not any(torch.equal(one, other) for one, other in combinations(made, 2)), "a seed was not drawn"
    call.check()


def test_memory_that_was_freed_is_refused_and_not_read(gpu: FakeGpu):
    call = Call(packed=True, more=("learned_sink", "alibi_slopes", "dlse"), numbers=(("dropout_p", 0.3),))
    for name in ("q", "k", "v", "dout", "dlse", "learned_sink", "alibi_slopes", "rng", "cu_seqlens_q"):
        call.check()
        tensors = {each: x if x is None else fake(x) for each, x in call.tensors().items()}
        tensors[name].untyped_storage().resize_(0)
        launched = len(gpu.launches)
        with pytest.raises(fa.FlashAttnError, match=name):
            call.run(tensors)
        assert len(gpu.launches) <= launched + 1, "the forward alone may run"


def test_debug_checks_values_each_time(gpu: FakeGpu, asked: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATOMR_FLASHATTN_DEBUG", "1")
    fa.settings.cache_clear()
    try:
        for _ in range(2):
            asked.clear()
            Call().check()
            assert asked == ["forward", "backward", "forward"]
        assert not repeat.shortcuts
    finally:
        monkeypatch.delenv("ATOMR_FLASHATTN_DEBUG")
        fa.settings.cache_clear()
    assert gpu.launches
