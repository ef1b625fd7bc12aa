"""Gradients of torch tensors on the card: autograd through the functional calls, layouts of dO, sizes beyond 32 bits, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

Tensors = list[Any]


@pytest.fixture
def family() -> Family:
    """The backward is that of one family, whichever ran the forward; its forward is that of the card."""
    return Family.FA2


def normal(*shape: int, seed: int = 0, dtype: Any = torch.bfloat16, device: str = DEVICE) -> Any:
    """Standard normal, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def leaves(*sizes: int, heads: tuple[int, int] = (4, 2), width: int = 64, dtype: Any = torch.bfloat16) -> Tensors:
    """q, k and v, (*sizes, H, D), that want gradients."""
    return [normal(*sizes, count, width, seed=i, dtype=dtype).requires_grad_() for i, count in enumerate((heads[0], heads[1], heads[1]))]


def gradients(loss: Any, tensors: Tensors) -> Tensors:
    """Of a loss that is differentiated once."""
    return list(torch.autograd.grad(loss, tensors))


def close(made: Tensors, expected: Tensors, bound: float = 2e-2) -> None:
    """Within ``bound`` of the largest element of each."""
    for one, other in zip(made, expected, strict=True):
        error = (one.double() - other.double()).abs().max().item()
        assert error <= bound * other.double().abs().max().item() + 1e-3, error


def plain(q: Any, k: Any, v: Any, *, causal: bool = False, seen: Any = None, keep: Any = None) -> tuple[Any, Any]:
    """o and LSE in float64 operations of torch; ``seen``: a mask (queries, keys); ``keep``: factors of the probabilities."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril(score.shape[-1] - score.shape[-2])
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(score, -1)
    probability = torch.exp(score - lse[..., None])
    return ((probability if keep is None else probability * keep) @ v).transpose(1, 2), lse


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "out": lambda out, _: (out.float() ** 2).sum(),
    "lse": lambda _, lse: (lse * lse).sum(),
    "both": lambda out, lse: (out.float().sin() * lse.cos().transpose(1, 2)[..., None]).sum(),
    "sum": lambda out, lse: out.sum() + 2 * lse.sum(),  # both gradients are expanded
    "transposed": lambda out, _: (out.transpose(1, 3) @ out.transpose(1, 3).mT).float().sum(),
    "slice of a cat": lambda out, _: (torch.cat([out, out.flip(1), 2 * out], dim=-1)[..., 3:150].float() ** 2).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autograd_is_that_of_a_plain_attention(loss: str, dtype: Any):
    tensors = leaves(2, 130, dtype=dtype)
    out, lse, _ = fa.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    made = torch.autograd.grad(LOSSES[loss](out, lse), tensors, allow_unused=True)
    expected = torch.autograd.grad(LOSSES[loss](*plain(*tensors, causal=True)), tensors, allow_unused=True)
    close([torch.zeros_like(t) if g is None else g for g, t in zip(made, tensors, strict=True)],
          [torch.zeros_like(t) if g is None else g for g, t in zip(expected, tensors, strict=True)])  # fmt: skip


def test_autograd_with_dropout_a_learned_sink_and_a_kept_graph():
    tensors = leaves(2, 100)
    sink = normal(4, dtype=torch.float32).requires_grad_()
    torch.manual_seed(5)
    out, _, keep = fa.flash_attn_func(*tensors, 0.3, learned_sink=sink, return_attn_probs=True)
    torch.manual_seed(6)  # the backward draws nothing
    loss = out.float().sin().sum()
    first = list(torch.autograd.grad(loss, [*tensors, sink], retain_graph=True))
    close(list(torch.autograd.grad(loss, [*tensors, sink])), first, 1e-2)  # additions to dQ come in any order
    factor = keep.double() * 256 / round(256 * 0.7)
    score_out, lse = plain(*tensors, keep=factor)
    weight = torch.sigmoid(lse - sink.double()[None, :, None]).transpose(1, 2)[..., None]
    expected = torch.autograd.grad((score_out * weight).sin().sum(), [*tensors, sink])
    close(first, list(expected))


def test_autograd_of_packed_sequences_and_packed_tensors():
    qkv = normal(150, 3, 4, 64).requires_grad_()
    ends = torch.tensor([0, 0, 61, 130], dtype=torch.int32, device=DEVICE)
    fa.flash_attn_varlen_qkvpacked_func(qkv, ends, 70, causal=True).float().square().sum().backward()
    made = qkv.grad
    assert not made[130:].any()
    expected = torch.zeros_like(made)
    for first, end in ((0, 61), (61, 130)):
        parts = [qkv.detach()[None, first:end, i].requires_grad_() for i in range(3)]
        expected[first:end] = torch.stack(gradients(plain(*parts, causal=True)[0].square().sum(), parts), 2)[0]
    close([made], [expected])


def test_a_call_of_before_without_gradients_leaves_no_shortcut_for_one_with_them():
    tensors = leaves(2, 64)
    for _ in range(3):
        with torch.no_grad():
            assert fa.flash_attn_func(*tensors).grad_fn is None
        made = fa.flash_attn_func(*tensors)
        assert made.grad_fn is not None
        assert all(each.abs().sum() > 0 for each in gradients(made.float().square().sum(), tensors))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_that_is_compiled_around_the_call():
    tensors = leaves(2, 64)
    model = lambda q, k, v: fa.flash_attn_func(q.sin(), k, v, causal=True) * 2  # noqa: E731
    expected = gradients(model(*tensors).float().square().sum(), tensors)
    torch._dynamo.reset()
    close(gradients(torch.compile(model, backend="eager")(*tensors).float().square().sum(), tensors), expected)


WINDOWS: dict[tuple[int, int], tuple[float, float]] = {  # as flash-attn takes them, and the keys that each row sees
    (-1, -1): (torch.inf, torch.inf),
    (-1, 0): (torch.inf, 0),
    (0, -1): (0, torch.inf),
    (0, 0): (0, 0),
    (7, -8): (7, torch.inf),
    (127, 0): (127, 0),
    (5000, 5000): (torch.inf, torch.inf),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_of_a_functional_call(window: tuple[int, int], causal: bool):
    tensors = leaves(1, 150)
    before, after = WINDOWS[window]
    row, key = torch.arange(150, device=DEVICE)[:, None], torch.arange(150, device=DEVICE)
    seen = (key >= row - before) & (key <= row + (0 if causal else after))
    made = gradients(fa.flash_attn_func(*tensors, window_size=window, causal=causal).float().square().sum(), tensors)
    close(made, gradients(plain(*tensors, seen=seen)[0].square().sum(), tensors))


def layouts(dout: Any) -> dict[str, Any]:
    """The same values, laid out in other ways."""
    batch, rows, heads, width = dout.shape
    wide = torch.full((batch, rows + 2, 3, heads, width + 24), torch.nan, dtype=dout.dtype, device=dout.device)
    wide[:, 1:-1, 1, :, 5 : 5 + width] = dout
    return {
        "inside of a larger one": wide[:, 1:-1, 1, :, 5 : 5 + width],
        "transposed": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "columns first": dout.transpose(1, 3).contiguous().transpose(1, 3),
        "slice of a cat": torch.cat([dout, dout], dim=1)[:, rows:],
        "heads of more": torch.cat([dout, dout], dim=2)[:, :, heads:],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 2, 2, 8)))
def test_layouts_of_the_gradient_of_o(layout: str):
    tensors, dout = leaves(2, 90), normal(2, 90, 4, 64, seed=9)
    out = fa.flash_attn_func(*tensors)
    expected = list(torch.autograd.grad(out, tensors, dout, retain_graph=True))
    made = list(torch.autograd.grad(out, tensors, layouts(dout)[layout]))
    close(made[:1], expected[:1], 1e-2)  # additions to dQ come in any order
    assert all(torch.equal(one, other) for one, other in zip(made[1:], expected[1:], strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 64), (1, 90, 4, 1), (1, 1, 4, 64)], ids=str)
def test_expanded_gradients_of_o(shape: tuple[int, ...]):
    tensors, dout = leaves(2, 90), normal(*shape, seed=9).expand(2, 90, 4, 64)
    out = fa.flash_attn_func(*tensors)
    expected = list(torch.autograd.grad(out, tensors, dout.contiguous(), retain_graph=True))
    made = list(torch.autograd.grad(out, tensors, dout))
    close(made[:1], expected[:1], 1e-2)
    assert all(torch.equal(one, other) for one, other in zip(made[1:], expected[1:], strict=True))


@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 2), (12, 4), (7, 1), (10, 2)])
def test_keys_of_grouped_heads_get_sums(heads: int, heads_kv: int):
    q, k, v = leaves(2, 70, heads=(heads, heads_kv))
    copies = [x.detach().repeat_interleave(heads // heads_kv, 2).requires_grad_() for x in (k, v)]
    made = gradients(fa.flash_attn_func(q, k, v, causal=True).float().square().sum(), [q, k, v])
    dq, *of_heads = gradients(fa.flash_attn_func(q, *copies, causal=True).float().square().sum(), [q, *copies])
    close(made, [dq, *(x.float().unflatten(2, (heads_kv, -1)).sum(3) for x in of_heads)])


def test_the_identity_as_v_reads_the_pattern_of_the_forward():
    """o is the dropped P then, and dV has to be its transpose times dO."""
    length = 128
    q, k = normal(1, length, 2, length), normal(1, length, 2, length, seed=1)
    v = torch.eye(length, device=DEVICE, dtype=torch.bfloat16)[None, :, None].expand(1, length, 2, length).contiguous().requires_grad_()
    torch.manual_seed(3)
    out = fa.flash_attn_func(q, k, v, 0.4, causal=True)
    dout = normal(*out.shape, seed=2)
    (dv,) = torch.autograd.grad(out, [v], dout)
    expected = torch.einsum("bihj,bihd->bjhd", out.double(), dout.double())
    close([dv], [expected], 1e-2)
    assert (out == 0).double().mean() > 0.6  # half hidden, 0.4 of the rest dropped


def cosine(made: Any, expected: Any) -> float:
    """The least of all batch entries."""
    return torch.nn.functional.cosine_similarity(made.double().flatten(1), expected.double().flatten(1)).min().item()


INPUTS: dict[str, Callable[[Any, int], Any]] = {
    "normal": lambda x, _: x,
    "outlier channels": lambda x, _: x * torch.where(torch.arange(x.shape[-1], device=x.device) % 32 == 0, 50, 1),
    "correlated tokens": lambda x, seed: x + 0.7 * normal(x.shape[0], 1, *x.shape[2:], seed=seed + 10),  # by a third
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_direction_of_gradients(kind: str, causal: bool):
    """Scores have a standard deviation of 1: where the softmax has one key, gradients are the rounding of o."""
    tensors = [INPUTS[kind](normal(4, 512, 4, 64, seed=i), i).to(torch.bfloat16).requires_grad_() for i in range(3)]
    dout = normal(4, 512, 4, 64, seed=20)
    scores = torch.einsum("bihd,bjhd->bhij", *(x.detach().double() for x in tensors[:2]))
    scale = 1 / (scores - scores.mean(-1, keepdim=True)).std().item()
    made = torch.autograd.grad(fa.flash_attn_func(*tensors, causal=causal, softmax_scale=scale), tensors, dout)
    q, k, v = (x.detach().double().requires_grad_() for x in tensors)
    expected = torch.autograd.grad(plain(q * (scale * 8), k, v, causal=causal)[0], [q, k, v], dout.double())
    for one, other in zip(made, expected, strict=True):
        assert cosine(one, other) > 0.9999
        assert abs(one.double().norm().item() / other.double().norm().item() - 1) < 5e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="4 GB of a card")
def test_offsets_of_dout_beyond_32_bits():
    """dO as columns of a wide array, in which the second sequence begins past element 2^31."""
    rows, first = 220_953, 220_753
    tensors = leaves(rows, heads=(2, 2))
    ends = torch.tensor([0, 100, first, rows], dtype=torch.int32, device=DEVICE)
    room = torch.empty(rows, 9728, dtype=torch.bfloat16, device=DEVICE)
    dout = room[:, 4096 : 4096 + 128].unflatten(1, (2, 64))
    dout.copy_(normal(rows, 2, 64, seed=4))
    assert dout[first:].storage_offset() > 2**31
    out = fa.flash_attn_varlen_func(*tensors, ends, ends, rows, rows, window_size=(64, 0))
    made = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    expected = torch.autograd.grad(out, tensors, dout.contiguous())
    close([made[0]], [expected[0]], 1e-2)
    assert all(torch.equal(one, other) for one, other in zip(made[1:], expected[1:], strict=True))
    last = [x.detach()[None, first:].requires_grad_() for x in tensors]
    alone = gradients((fa.flash_attn_func(*last, window_size=(64, 0)) * dout[None, first:]).sum(), last)
    close([each[first:] for each in made], [each[0] for each in alone], 1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="50 GB of a card")
@pytest.mark.parametrize("heads_kv", [128, 1])
def test_more_elements_than_32_bits_count(heads_kv: int):
    """Of q, its sum of gradients, and with as many KV heads of k and v too: the last head and the last sequence are right."""
    shapes = ((2, 66_000, 128, 128), (2, 66_000, heads_kv, 128), (2, 66_000, heads_kv, 128))
    tensors = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for shape in shapes]
    dout = torch.randn(shapes[0], dtype=torch.bfloat16, device=DEVICE)
    assert tensors[0].numel() > 2**31
    made = torch.autograd.grad(fa.flash_attn_func(*tensors, window_size=(100, 0)), tensors, dout)
    for head in (0, 127):
        alone = [x.detach()[1:, -3000:, head if x.shape[2] > 1 else 0, None].requires_grad_() for x in tensors]
        upstream = dout[1:, -3000:, head, None]
        (dq, *others) = torch.autograd.grad(fa.flash_attn_func(*alone, window_size=(100, 0)), alone, upstream)
        close([made[0][1:, -2000:, head, None]], [dq[:, -2000:]], 1e-2)
        if heads_kv > 1:
            close([x[1:, -2000:, head, None] for x in made[1:]], [x[:, -2000:] for x in others], 1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU backend has one stream")
def test_a_stream_of_the_caller_and_memory_that_torch_may_give_away():
    """The workspace is freed on the current stream while the other one still works."""
    q, k, v = (x.detach() for x in leaves(2, 2048, heads=(8, 8)))
    dout = normal(2, 2048, 8, 64, seed=9)
    done = fa.run(fa.DenseFwdRequest(q, k, v))
    request = fa.DenseBwdRequest(q, k, v, done.out, dout, done.lse)
    expected = fa.run(request)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
        made = fa.run(request, stream=side)
        torch.empty(8 << 20, device=DEVICE).fill_(torch.nan)  # as large as the workspace
        torch.cuda.synchronize()
        close([made.dq, made.dk, made.dv], [expected.dq, expected.dk, expected.dv], 1e-2)
