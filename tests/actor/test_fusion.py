"""Small decodes that wait together become one launch, with the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import FlashAttnActor, FlashAttnInner, FlashAttnMsg, FlashAttnProps
from atomr_accel_flashattn.actor.fusion import MAX_FUSED, fuse_key
from tests.actor.devices import PATIENCE, HeldDevice, message


def decode(seed: int, seqlen_k: int, *, batch: int = 1, seqlen_q: int = 1, dtype: str = "float32", **options: Any) -> FlashAttnMsg.Forward:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seqlen_q, 4, 16)).astype(dtype)
    k, v = rng.standard_normal((2, batch, seqlen_k, 2, 16)).astype(dtype)
    if options.pop("torch", False):
        import torch

        q, k, v = (torch.from_numpy(array) for array in (q, k, v))
    return FlashAttnMsg.Forward(fa.Fa2FwdRequest(q, k, v, **options))


class CountingDevice(HeldDevice):
    """The CPU backend behind a first launch that the test holds, so that the rest gathers in the mailbox."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.reference = FlashAttnInner.reference()
        self.break_fused = False

    def launch(self, jobs: Any) -> Any:
        self.sizes.append(len(jobs))
        if len(self.sizes) == 1:
            return super().launch(jobs)
        if self.break_fused and len(jobs) > 1:
            raise fa.LaunchError("a fused launch that fails")
        return self.reference.launch(jobs)


def send_together(messages: list[FlashAttnMsg.Forward], **props: Any) -> tuple[list[Any], list[int]]:
    device = props.pop("device_object", None) or CountingDevice()
    with FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1, **props), device) as actor:
        first = actor.ask(message())
        device.wait_for(1)
        blocker = actor.ask(message(seqlen_q=9))  # taken out of the mailbox alone; the actor waits with it
        while actor.waiting:
            pass
        replies = [actor.ask(each) for each in messages]
        device.land_all()
        first.result(PATIENCE)
        blocker.result(PATIENCE)
        return [reply.result(PATIENCE) for reply in replies], device.sizes[2:]


SAME = [
    {},
    {"mask": fa.MaskKind.causal()},
    {"mask": fa.MaskKind.sliding_causal(5), "sink_tokens": 2},
    {"options": fa.AttentionOptions(softcap=3.0, softmax_scale=0.4)},
]


@pytest.mark.parametrize("options", SAME, ids=str)
@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_answers_are_bitwise_those_of_single_launches(options: dict[str, Any], library: str, dtype: str):
    cases = [(1, 1), (2, 40), (3, 7), (4, 300), (5, 33)]
    messages = [
        decode(seed, seqlen_k, batch=1 + seed % 3, seqlen_q=1 + seed % 2, dtype=dtype, torch=library == "torch", **options)
        for seed, seqlen_k in cases
    ]
    outputs, sizes = send_together(messages, fuse_decodes=True)
    assert sizes == [len(messages)]
    for each, output in zip(messages, outputs, strict=True):
        direct = fa.run(each.request)
        np.testing.assert_array_equal(np.asarray(output.out), np.asarray(direct.out))
        np.testing.assert_array_equal(np.asarray(output.lse), np.asarray(direct.lse))
        assert type(output.out) is type(each.request.q)


def test_slopes_and_sinks_that_are_shared_are_fused():
    slopes, sink = np.linspace(0.1, 1, 4, dtype=np.float32), np.linspace(-1, 1, 4, dtype=np.float32)
    shared = {"bias": fa.PositionBias.alibi(slopes), "options": fa.AttentionOptions(learned_sink=sink)}
    messages = [decode(seed, 10 + seed, **shared) for seed in range(3)]
    outputs, sizes = send_together(messages, fuse_decodes=True)
    assert sizes == [3]
    for each, output in zip(messages, outputs, strict=True):
        np.testing.assert_array_equal(output.out, fa.run(each.request).out)


def test_nothing_is_fused_unless_asked():
    _, sizes = send_together([decode(seed, 9) for seed in range(3)])
    assert sizes == [1, 1, 1]


def test_neighbours_that_differ_are_launched_in_order_and_apart():
    a, b = {"mask": fa.MaskKind.causal()}, {"mask": fa.MaskKind.full()}
    messages = [decode(0, 5, **a), decode(1, 6, **a), decode(2, 7, **b), message(3, seqlen_q=20), decode(4, 8, **a), decode(5, 9, **a)]
    outputs, sizes = send_together(messages, fuse_decodes=True)
    assert sizes == [2, 1, 1, 2]
    for each, output in zip(messages, outputs, strict=True):
        np.testing.assert_array_equal(output.out, fa.run(each.request).out)


def test_a_launch_holds_at_most_so_many():
    _, sizes = send_together([decode(seed, 4) for seed in range(MAX_FUSED + 5)], fuse_decodes=True)
    assert sum(sizes) == MAX_FUSED + 5
    assert max(sizes) == MAX_FUSED


def test_when_the_fused_launch_fails_each_is_launched_alone():
    device = CountingDevice()
    device.break_fused = True
    messages = [decode(seed, 4) for seed in range(3)]
    outputs, sizes = send_together(messages, fuse_decodes=True, device_object=device)
    assert sizes == [3, 1, 1, 1]
    for each, output in zip(messages, outputs, strict=True):
        np.testing.assert_array_equal(output.out, fa.run(each.request).out)


def test_a_cancelled_one_stays_out_of_the_launch():
    device = CountingDevice()
    with FlashAttnActor.start(FlashAttnProps(device="cpu", max_in_flight=1, fuse_decodes=True), device) as actor:
        actor.ask(message())
        device.wait_for(1)
        actor.ask(message(seqlen_q=9))
        while actor.waiting:
            pass
        replies = [actor.ask(decode(seed, 6)) for seed in range(4)]
        assert replies[1].cancel()
        device.land_all()
        assert replies[3].result(PATIENCE).out is not None
    assert device.sizes[2:] == [3]


@pytest.mark.parametrize(
    ("alone", "why"),
    [
        (lambda: decode(0, 5, out=np.empty((1, 1, 4, 16), np.float32)), "a later request could read what it writes"),
        (lambda: decode(0, 5, options=fa.AttentionOptions(dropout_p=0.1)), "the pattern depends on the batch index"),
        (lambda: decode(0, 5, seqlen_q=20), "a prefill"),
        (lambda: decode(0, 8193), "more K and V than is worth a copy"),
        (lambda: decode(0, 5, bias=fa.PositionBias.alibi(np.ones((1, 4), np.float32))), "slopes by batch"),
        (lambda: FlashAttnMsg.Forward(decode(0, 5).request, dropout_mask=True), "wants the dropout pattern"),
        (lambda: FlashAttnMsg.Backward(decode(0, 5).request), "no forward"),
    ],
)
def test_what_is_not_fused(alone: Any, why: str):
    assert fuse_key(alone()) is None, why


def test_keys_differ_where_answers_would():
    base = fuse_key(decode(0, 5))
    assert base is not None
    assert fuse_key(decode(1, 50, batch=3)) == base
    for other in ({"mask": fa.MaskKind.causal()}, {"options": fa.AttentionOptions(softcap=1.0)}, {"dtype": "float16"}):
        assert fuse_key(decode(0, 5, **other)) not in {None, base}


def test_fused_requests_keep_the_family_they_ask_for():
    from atomr_accel_flashattn.actor.fusion import _pack
    from atomr_accel_flashattn.kernels.spec import Family
    from atomr_accel_flashattn.types import SmArch

    q = np.ones((1, 1, 4, 64), np.float16)
    for kind, family in ((fa.Fa2FwdRequest, Family.FA2), (fa.DenseFwdRequest, Family.FA3)):
        requests = [kind(q, q, q) for _ in range(2)]
        key = _pack(requests).dispatch_key(SmArch.SM_90A)
        assert fa.lookup(key).family is family
        assert fa.lookup(requests[0].dispatch_key(SmArch.SM_90A)).family is family
    mixed = [fuse_key(FlashAttnMsg.Forward(kind(q, q, q))) for kind in (fa.Fa2FwdRequest, fa.DenseFwdRequest)]
    assert None not in mixed
    assert mixed[0] != mixed[1]
