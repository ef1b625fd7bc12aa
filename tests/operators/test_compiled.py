"""Functional calls inside of torch.compile: one graph, forward and backward, equal to the eager call."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from tests.operators.calls import FORMS, OPTIONS, gradients, leaves, parts_of  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def run(function: Callable[..., Any], tensors: list[Any], seed: int = 3) -> tuple[list[Any], list[Any]]:
    """What a call makes, and the gradients of all that can be differentiated."""
    torch.manual_seed(seed)
    made = parts_of(function(*tensors))
    loss = sum((number + 1) * x.sin().sum() for number, x in enumerate(made) if x.is_floating_point())
    return made, gradients(loss, tensors)


def same(ones: tuple[list[Any], list[Any]], others: tuple[list[Any], list[Any]]) -> None:
    for made, expected in zip(ones, others, strict=True):
        assert len(made) == len(expected)
        for one, other in zip(made, expected, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_one_graph(name: str):
    sizes, call = FORMS[name]
    heads = (2, 2) if "qkvpacked" in name else (4, 2)
    function = lambda q, k, v: call(q.sin(), k, v, causal=True, dropout_p=0.2, return_attn_probs=True)  # noqa: E731
    same(run(compiled(function), leaves(*sizes, heads=heads)), run(function, leaves(*sizes, heads=heads)))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_no_option_is_dropped(name: str, packed: bool):
    sizes, call = FORMS["flash_attn_varlen_func" if packed else "flash_attn_func"]
    function = lambda q, k, v: call(q, k, v, **OPTIONS[name])  # noqa: E731
    made = run(compiled(function), leaves(*sizes))
    same(made, run(function, leaves(*sizes)))
    without = run(call, leaves(*sizes))
    changes = name not in {"none", "deterministic", "softcap of none"}
    assert changes == (len(made[0]) > 1 or not torch.equal(made[0][0], without[0][0])), "the option does nothing"


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_with_inductor(name: str):
    sizes, call = FORMS[name]
    function = lambda q, k, v: call(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v, causal=True, dropout_p=0.2) * 2  # noqa: E731
    for one, other in zip(run(compiled(function, "inductor"), leaves(*sizes)), run(function, leaves(*sizes)), strict=True):
        for made, expected in zip(one, other, strict=True):
            torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("widths", [(7, 7), (12, 20), (16, 13)], ids=str)
def test_padded_head_dims(widths: tuple[int, int]):
    def tensors() -> list[Any]:
        return [*leaves(width=widths[0])[:2], leaves(width=widths[1])[2]]

    function = lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True)  # noqa: E731
    made, expected = run(compiled(function), tensors()), run(function, tensors())
    assert made[0][0].shape == expected[0][0].shape
    same(made, expected)


def test_a_learned_sink_gets_its_gradient():
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    function = lambda q, k, v, sink: fa.flash_attn_func(q, k, v, learned_sink=sink)  # noqa: E731
    made = run(compiled(function), [*leaves(), sink])
    same(made, run(function, [*leaves(), sink]))
    assert made[1][3].abs().min() > 0


def test_the_lse_alone_has_gradients():
    function = lambda q, k, v: fa.flash_attn_func(q, k, v, return_attn_probs=True)[1]  # noqa: E731
    tensors = leaves()
    made = torch.autograd.grad(compiled(function)(*tensors).sin().sum(), tensors[:2])
    expected = torch.autograd.grad(function(*tensors).sin().sum(), tensors[:2])
    assert all(torch.equal(one, other) and one.abs().sum() > 0 for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize("wanting", [False, True], ids=["forward", "training"])
def test_dropout_is_drawn_anew_by_every_run(wanting: bool):
    """The graph of a training step is split by a partitioner, which merges equal nodes."""
    q, k, v = (x.detach().requires_grad_(wanting) for x in leaves(1, 40))
    function = compiled(lambda q, k, v: (fa.flash_attn_func(q, k, v, 0.4), fa.flash_attn_func(q, k, v, 0.4)))
    first, second = function(q, k, v)
    assert not torch.equal(first, second), "two draws of one graph were taken for one"
    assert not torch.equal(function(q, k, v)[0], first)


def check_one_graph(call: Callable[..., Any], make: Callable[[int], tuple[Any, ...]]) -> None:
    """Calls of 50 lengths are compiled once, and equal the eager ones. A first length of 5 is no other size of the call."""
    function = compiled(call, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(5, 55):
            arguments = make(number)
            assert torch.equal(function(*arguments), call(*arguments)), number


def test_50_lengths_compile_once():
    check_one_graph(lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True), lambda n: tuple(leaves(3, n)))


LENGTHS: dict[str, Callable[[int], Any]] = {"int": int, "NumPy": np.int64, "NumPy int32": np.int32, "tensor": torch.tensor}


@pytest.mark.parametrize("kind", LENGTHS)
def test_50_packed_lengths_compile_once(kind: str):
    def call(q: Any, k: Any, v: Any, ends: Any, most: Any) -> Any:
        return fa.flash_attn_varlen_func(q, k, v, ends, ends, most, most, causal=True)

    check_one_graph(call, lambda n: (*leaves(3 * n), torch.tensor([0, n, 3 * n], dtype=torch.int32), LENGTHS[kind](2 * n)))


def test_a_symbolic_longest_length_compiles_once():
    check_one_graph(
        lambda q, k, v, ends: fa.flash_attn_varlen_func(q, k, v, ends, ends, q.shape[0], k.shape[0]),
        lambda n: (*leaves(3 * n), torch.tensor([0, n, 3 * n], dtype=torch.int32)),
    )


def test_sequences_of_an_unknown_total_are_one_graph():
    """As unpad_input makes them: the total is known when it runs."""

    def call(x: Any, keep: Any, ends: Any) -> Any:
        x = x[keep.nonzero().squeeze(1)]
        return fa.flash_attn_varlen_qkvpacked_func(x, ends, 7, causal=True)

    x, keep = torch.randn(15, 3, 2, 16), torch.arange(15) % 5 != 0
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(call)(x, keep, ends), call(x, keep, ends))


def test_a_pattern_whose_size_is_a_tensor():
    ends, most = torch.tensor([0, 5, 12], dtype=torch.int32), torch.tensor(7)
    call = lambda q, k, v: fa.flash_attn_varlen_func(q, k, v, ends, ends, most, most, 0.3, return_attn_probs=True)  # noqa: E731
    same(run(compiled(call), leaves(12)), run(call, leaves(12)))


def test_out_is_written():
    q, k, v = (x.detach() for x in leaves())
    out = torch.full_like(q, torch.nan)
    call = lambda q, k, v, out: fa.flash_attn_func(q, k, v, out=out)  # noqa: E731
    assert compiled(call)(q, k, v, out) is out
    assert torch.equal(out, fa.flash_attn_func(q, k, v))
    for wrong in (torch.empty(1, 6, 4, 16), torch.empty(2, 6, 4, 16, dtype=torch.float64)):
        with pytest.raises(fa.OutputError, match="out: got"):
            torch.compile(call, backend="aot_eager")(q, k, v, wrong)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (fa.WindowError, {"window_size": (1, 2, 3)}),
        (fa.DropoutError, {"dropout_p": 1.0}),
        (fa.SinkWithoutMaskError, {"sink_tokens": 2}),
        (fa.UnsupportedArgumentError, {"causal": "yes"}),
        (fa.ScaleError, {"softmax_scale": float("nan")}),
        (fa.SlopesError, {"alibi_slopes": torch.ones(3)}),
        (fa.FeatureNotBuiltError, {"alibi_slopes": torch.ones(4, requires_grad=True)}),
        (fa.OutputError, {"out": torch.empty(2, 6, 4, 16)}),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks for it and hides the warning
def test_what_is_refused_is_refused_by_name(error: type[Exception], options: dict[str, Any]):
    """Without ``fullgraph``, where torch's compiler gives way to the call."""
    with pytest.raises(error):
        torch.compile(lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, **options), backend="eager")(*leaves())


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("window_size: got (1, 2, 3); allowed is (left, right)", {"window_size": (1, 2, 3)}),
        ("dropout_p: got 1.0; allowed is 0 <= p < 1", {"dropout_p": 1.0}),
        ("alibi_slopes: got shape (3,); allowed is (4,)", {"alibi_slopes": torch.ones(3)}),
    ],
    ids=["window", "dropout", "slopes"],
)
def test_a_refusal_in_one_graph_says_why(said: str, options: dict[str, Any]):
    """The error is of torch's compiler, which quotes ours, or is ours where only the run finds it."""
    with pytest.raises(Exception, match=re.escape(said)):
        compiled(lambda q, k, v: fa.flash_attn_func(q, k, v, **options))(*(x.detach() for x in leaves()))


def without_longest(q: Any) -> Any:
    """A packed call that leaves the longest length to the values of the offsets."""
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    return fa.flash_attn_varlen_func(q, q, q, ends, ends, None, None)  # type: ignore[arg-type]


def test_a_longest_length_of_none_is_refused_in_one_graph_and_read_outside_of_it():
    q = torch.randn(5, 2, 8)
    said = "max_seqlen of cu_seqlens_q: got None in a call that torch records; pass an integer"
    with pytest.raises(Exception, match=re.escape(said)):
        compiled(without_longest)(q)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(without_longest, backend="eager")(q), without_longest(q))


def test_arrays_of_two_libraries_are_refused_in_one_graph_and_taken_outside_of_it():
    q, k = torch.randn(1, 5, 2, 8), np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)
    call = lambda q, k: fa.flash_attn_func(q, k, k)  # noqa: E731
    with pytest.raises(Exception, match="k: got ndarray in a call that torch records; allowed are torch tensors"):
        compiled(call)(q, k)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager")(q, k), call(q, k))


def test_a_first_call_that_is_refused_is_refused_by_name():
    """Eager calls meet torch first; a compiled one that gives way may be what does."""
    program = (
        "import torch, atomr_accel_flashattn as fa\n"
        "x = torch.zeros(1, 4, 2, 16)\n"
        "try:\n"
        "    torch.compile(lambda x: fa.flash_attn_func(x, x, x, window_size=(1.5, 0)), backend='eager')(x)\n"
        "except fa.WindowError:\n"
        "    print('refused')\n"
    )
    made = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert made.stdout == "refused\n"


@pytest.mark.parametrize("kind", [float, np.float64])
def test_a_scale_and_a_probability_that_change_are_not_kept(kind: Callable[[float], float]):
    call = lambda q, k, v, scale, p: fa.flash_attn_func(q, k, v, p, scale, softcap=scale)  # noqa: E731
    function = compiled(call)
    for scale, p in ((0.1, 0.0), (0.2, 0.0), (0.3, 0.25), (0.4, 0.5), (0.1, 0.5)):
        arguments = (*leaves(), kind(scale), kind(p))
        torch.manual_seed(3)
        made = function(*arguments)
        torch.manual_seed(3)
        assert torch.equal(made, call(*arguments)), (scale, p)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_scale_that_numpy_computes(fullgraph: bool):
    """torch.compile takes a number of NumPy for an array without dimensions."""
    call = lambda q, k, v: fa.flash_attn_func(q, k, v, softmax_scale=2 / np.sqrt(q.shape[-1]))  # noqa: E731
    tensors = leaves()
    assert torch.equal(torch.compile(call, fullgraph=fullgraph, backend="aot_eager")(*tensors), call(*tensors))


def test_broadcast_layouts_do_not_share_a_graph():
    q, k, v = (x.detach() for x in leaves(2, 6, heads=(2, 2)))
    function = compiled(fa.flash_attn_func)
    for keys in (k, k[:1].expand_as(k), k[:, :1].expand_as(k), k.transpose(1, 2).contiguous().transpose(1, 2), k):
        made = function(q, keys, v)
        assert torch.equal(made, fa.flash_attn_func(q, keys, v))
        assert made.stride() == fa.flash_attn_func(q, keys, v).stride()


def test_arrays_of_numpy_are_traced_as_tensors():
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 16)).astype(np.float32)
    made = compiled(lambda x: fa.flash_attn_func(x, x, x), "eager")(x)
    assert isinstance(made, np.ndarray)
    np.testing.assert_allclose(made, fa.flash_attn_func(x, x, x), rtol=1e-5, atol=1e-6)
