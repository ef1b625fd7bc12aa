"""Sweeps over a KV cache on the device: split counts, lengths, ratios, offsets, appends and chunks, judged by torch in float64.

All calls are bf16. In the wgmma family they have queries enough to fill a warpgroup, which decoding has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.fa3_fwd import WARPGROUP_ROWS, fits_warpgroup  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA  # noqa: E402
from tests.gpu.test_kv_cache import on_the_device  # noqa: E402, F401 - a fixture: workspaces are full of NaN
from tests.oracle import LSE_TOLERANCE, Tolerance  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

PAGE, BATCH, LONGEST = 16, 72, 144 * 1024
LENGTHS = range(1, 5001, 7 if DEVICE != "cpu" else 417)
SPLITS = (0, 1, 2, 3, 5, 8, 16, 37, 64, 128)
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of every call of a sweep."""

    heads: int = 8
    heads_kv: int = 2
    head_dim: int = 128
    causal: bool = True
    left: int | None = None
    sink_tokens: int = 0
    learned_sink: bool = False
    softcap: float = 0.0

    def sink(self) -> Any:
        return torch.linspace(-1, 3, self.heads, device=DEVICE) if self.learned_sink else None

    def queries(self, family: Family) -> int:
        """Of a sequence: those that a kernel of the family answers."""
        ratio = self.heads // self.heads_kv
        return 1 if family is Family.FA2 else WARPGROUP_ROWS // (ratio if fits_warpgroup(ratio) else 1)

    def request(self, call: Call, splits: int = 0) -> Any:
        return fa.PagedAttentionRequest(
            call.q,
            call.k,
            call.v,
            call.table,
            call.lengths,
            mask=fa.MaskKind(self.left, 0 if self.causal else None),
            sink_tokens=self.sink_tokens,
            options=fa.AttentionOptions(softcap=self.softcap, learned_sink=self.sink()),
            num_splits=splits,
        )


@dataclass(eq=False)
class Call:
    """q (B, Sq, Hq, D), pages (blocks, page, Hkv, D), table (B, entries) and lengths (B,) on the device."""

    q: Any
    k: Any
    v: Any
    table: Any
    lengths: Any


@dataclass(frozen=True, eq=False)
class Expected:
    """o (B, Sq, Hq, D) and the LSE (B, Hq, Sq) in float64, and the allowed error of o of each sequence."""

    out: Any
    lse: Any
    bound: Any

    def judge(self, out: Any, lse: Any) -> None:
        error = (out.double() - self.out).abs().amax((1, 2, 3))  # NaN stays NaN, and is in no bound
        wrong = (~(error <= self.bound)).nonzero().ravel()
        assert not len(wrong), f"o of sequences {wrong.tolist()}: error {error[wrong].tolist()} > {self.bound[wrong].tolist()}"
        right = (lse == self.lse) | ((lse.double() - self.lse).abs() <= LSE_TOLERANCE)  # -inf is equal to -inf only
        assert bool(right.all()), f"LSE of sequences {(~right).any(-1).any(-1).nonzero().ravel().tolist()}, more than {LSE_TOLERANCE} off"


def bfloat16(seed: int = 0) -> Any:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE).to(torch.bfloat16)


def int32(values: Any) -> Any:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def call_of(asked: Asked, lengths: list[int], queries: int, *, page: int = PAGE, pages: int = 400, longest: int = 0) -> Call:
    """Sequences read pages of one pool at random; entries that they do not use name no page."""
    random, normal = np.random.default_rng(len(lengths)), bfloat16()
    entries = -(-max(*lengths, longest, 1) // page)
    table = random.integers(0, pages, (len(lengths), entries)).astype(np.int32)
    unused = np.arange(entries) * page >= np.maximum(lengths, longest)[:, None]
    table[unused] = random.choice(np.array([-1, 2**31 - 1], np.int32), int(unused.sum()))
    q = 2 * normal(len(lengths), queries, asked.heads, asked.head_dim)  # scores of unequal keys
    k, v = (normal(pages, page, asked.heads_kv, asked.head_dim) for _ in "kv")
    return Call(q, k, v, int32(table), int32(lengths))


def expected_of(asked: Asked, call: Call) -> Expected:
    """Plain attention on the gathered keys, and the bound of the tolerance rule for each sequence."""
    longest = max(1, int(call.lengths.max()))
    entries = -(-longest // call.k.shape[1])
    pages = call.table[:, :entries].long().clamp(0, call.k.shape[0] - 1)
    slot = torch.arange(longest, device=DEVICE)
    unused = slot >= call.lengths[:, None]
    gathered = (x[pages].flatten(1, 2)[:, :longest].masked_fill(unused[..., None, None], 0) for x in (call.k, call.v))
    k, v = (x.transpose(1, 2) for x in gathered)  # (B, Hkv, keys, D)
    q = call.q.unflatten(2, (asked.heads_kv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, Hkv, ratio Sq, D)
    queries = call.q.shape[1]
    p = (call.lengths[:, None] - queries + torch.arange(queries, device=DEVICE))[..., None]
    seen = slot <= p if asked.causal else ~unused[:, None].expand(-1, queries, -1)
    if asked.left is not None:
        seen = seen & ((slot >= p - asked.left) | (slot < asked.sink_tokens))
    seen = seen[:, None, None]

    def evaluate(kind: Any, rounded: Any) -> tuple[Any, Any]:
        scores = (q.to(kind) @ k.to(kind).mT).mul_(asked.head_dim**-0.5).unflatten(2, (-1, queries))
        scores = asked.softcap * torch.tanh(scores / asked.softcap) if asked.softcap else scores
        lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        if asked.learned_sink:
            lse = torch.logaddexp(lse, asked.sink().to(kind).view(asked.heads_kv, -1, 1))
        weights = (scores - lse[..., None]).exp_().masked_fill_(~seen, 0).to(rounded).to(kind)
        out = (weights.flatten(2, 3) @ v.to(kind)).to(rounded).unflatten(2, (-1, queries))
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.flatten(1, 2)

    out, lse = evaluate(torch.float64, torch.float64)
    plain, _ = evaluate(torch.float32, torch.bfloat16)
    pairs = zip(out.cpu().numpy(), plain.float().cpu().numpy(), strict=True)
    bound = [Tolerance.of_output(DType.BF16, exact, [rounded]).bound for exact, rounded in pairs]
    return Expected(out, lse, torch.tensor(bound, dtype=torch.float64, device=DEVICE))


def check(asked: Asked, call: Call, family: Family, splits: tuple[int, ...]) -> None:
    expected = expected_of(asked, call)
    for count in splits:
        request = asked.request(call, count)
        if HAS_WGMMA:
            header = fa.lookup(request.dispatch_key()).HEADER
            assert header == f"{family.value}_kvcache"
        made = fa.run(request)
        expected.judge(made.out, made.lse)


def batches_with_empty_ones(lengths: range, size: int) -> Iterator[list[int]]:
    """A sequence without keys before each eleventh."""
    for first in range(0, len(lengths), size):
        part = lengths[first : first + size]
        yield [each for index, length in enumerate(part) for each in ([0, length] if index % 11 == 0 else [length])]


SWEEPS = {
    "causal": Asked(),
    "a window that empties splits": Asked(left=100),
    "sinks and softcap": Asked(left=300, sink_tokens=40, learned_sink=True, softcap=15.0),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_split_counts_and_lengths(name: str, family: Family):
    """1 to 128 parts of 1 to 5000 keys, empty sequences among them."""
    for lengths in batches_with_empty_ones(LENGTHS, BATCH):
        check(SWEEPS[name], call_of(SWEEPS[name], lengths, SWEEPS[name].queries(family)), family, SPLITS)


@pytest.mark.parametrize("ratio", [1, 4, 5, 6, 7, 8])
def test_ratios(ratio: int, family: Family):
    asked = Asked(heads=2 * ratio, learned_sink=True)
    lengths = LENGTHS[:: 13 if DEVICE != "cpu" else 3]
    for part in batches_with_empty_ones(lengths, 20):
        check(asked, call_of(asked, part, asked.queries(family)), family, (0, 1, 3, 16, 128))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
@pytest.mark.parametrize("splits", [0, 1])
def test_a_graph_captured_at_16_follows_lengths_and_table(splits: int, family: Family):
    """Without a StepPlan (tests/gpu/test_step_plan.py has those): replays have the bits of eager calls."""
    asked = Asked()
    call = call_of(asked, [16, 16, 16], asked.queries(family), page=64, pages=2000, longest=LONGEST)
    request = asked.request(call, splits)
    fa.run(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = fa.run(request)
    fills = [(0, 0, 0), (1, 0, 1), (4096, 1, 0), (LONGEST, 0, 1), (77, LONGEST, 4096), (16, 16, 16)]
    for index, lengths in enumerate(fills):
        call.lengths.copy_(int32(lengths))
        call.table.copy_(call.table.roll(index + 1, 1))
        call.q.copy_(2 * bfloat16(index)(*call.q.shape))
        made.out.fill_(NAN)
        made.lse.fill_(NAN)
        graph.replay()
        eager = fa.run(request)
        assert torch.equal(made.out, eager.out)
        assert torch.equal(made.lse, eager.lse)
        expected_of(asked, call).judge(made.out, made.lse)


def test_pages_on_both_sides_of_2_31_elements(family: Family):
    """Pages 2065 and 2066 of a stride of 1,039,680 elements are written and read as in a small cache."""
    stride, pages, asked = 1_039_680, (2064, 2065, 2066), Asked()
    if DEVICE != "cpu" and torch.cuda.mem_get_info(DEVICE)[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    assert 2065 * stride < 2**31 < 2066 * stride
    normal = bfloat16()
    held, new = normal(2, 3, PAGE, 2, 128), normal(2, 2, 16, 2, 128)
    q = normal(2, asked.queries(family), 8, 128)
    storage = torch.empty(2067 * stride, dtype=torch.bfloat16, device=DEVICE)
    far = [storage[start:].as_strided((2067, PAGE, 2, 128), (stride, 256, 128, 1)) for start in (0, stride // 2)]
    near = [x.clone() for x in held]
    for cache, x in zip(far, held, strict=True):
        cache.fill_(NAN)
        cache[pages[0] :] = x
    answers = []
    for caches, first in ((far, pages[0]), (near, 0)):
        asked_now = {"block_table": int32([[1, 2], [0, -1 - first]]) + first, "cache_seqlens": int32([12, 0])}
        answers.append(fa.flash_attn_with_kvcache(q, *caches, *new, **asked_now, causal=True, num_splits=2, return_softmax_lse=True))
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)
    for cache, small, before in zip(far, near, held, strict=True):
        assert torch.equal(cache[pages[0] :], small)
        assert not torch.equal(small[2], before[2])
        assert bool(cache[: pages[0]].isnan().all())
    call = Call(q, *near, int32([[1, 2], [0, -1]]), int32([28, 16]))
    expected_of(asked, call).judge(*answers[0])


def test_identical_requests_have_identical_rows(family: Family):
    """1 to 9 queries each, 1 to 5 of them: without the promise of batch invariance, too. 8 and 9 fill a warpgroup."""
    asked = Asked(heads_kv=1, head_dim=64)
    headers = set()
    for queries in range(1, 10):
        one = call_of(asked, [1471], queries)
        expected = expected_of(asked, one)
        for batch in range(1, 6):
            q, table, lengths = (x.repeat_interleave(batch, 0) for x in (one.q, one.table, one.lengths))
            request = asked.request(Call(q, one.k, one.v, table, lengths))
            headers.add(getattr(fa.lookup(request.dispatch_key()), "HEADER", "cpu"))
            made = fa.run(request)
            assert torch.equal(made.out, made.out[:1].expand_as(made.out))
            assert torch.equal(made.lse, made.lse[:1].expand_as(made.lse))
            expected.judge(made.out, made.lse)
    assert ("fa3_kvcache" in headers) is (HAS_WGMMA and family is Family.FA3)


def rotated(x: Any, cos: Any, sin: Any, *, interleaved: bool) -> Any:
    """x (..., Hq, D) by rows of cos and sin (..., r / 2), in float32 and rounded once."""
    half, made = cos.shape[-1], x.clone()
    c, s, wide = cos.float()[..., None, :], sin.float()[..., None, :], x.float()
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = wide[..., first], wide[..., second]
    made[..., first], made[..., second] = (a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype)
    return made


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(0, True), (32, True), (32, False), (128, True), (128, False)])
def test_what_is_appended_has_the_bits_of_rotating_outside(rotary_dim: int, interleaved: bool, paged: bool, family: Family):
    """1, 2 and 5 tokens behind 0, 1, a page less one, and a page; the rest of the cache keeps its bits."""
    asked, before = Asked(), [0, 1, PAGE - 1, PAGE]
    for new in (1, 2, 5):
        queries, normal = max(new, asked.queries(family)), bfloat16(new)
        size = PAGE if paged else 40
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(new))[:8].view(4, 2)[:, : 2 if paged else 1]
        q, (k_new, v_new) = normal(4, queries, 8, 128), normal(2, 4, new, 2, 128)
        caches = [torch.full((12, size, 2, 128), NAN, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
        for cache in caches:
            for row, length in zip(rows.tolist(), before, strict=True):
                cache[row[0], :length] = normal(length, 2, 128)
        expected = [x.clone() for x in caches]
        angle = 3 * bfloat16(7)(PAGE + queries, rotary_dim // 2).float()  # as long as it must be
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        own_q = q.clone()
        for index, (row, length) in enumerate(zip(rows.tolist(), before, strict=True)):
            at = slice(length, length + queries)
            own_q[index] = rotated(q[index], cos[at], sin[at], interleaved=interleaved)
            own_k = rotated(k_new[index], cos[at][:new], sin[at][:new], interleaved=interleaved)
            for token, slot in enumerate(range(length, length + new)):
                expected[0][row[slot // size], slot % size], expected[1][row[slot // size], slot % size] = own_k[token], v_new[index, token]
        lengths, table = int32(before), rows.to(DEVICE, torch.int32)
        more = {"block_table": table} if paged else {"cache_batch_idx": table[:, 0].contiguous()}
        if rotary_dim:
            more |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        made = fa.flash_attn_with_kvcache(q, *caches, k_new, v_new, cache_seqlens=lengths, causal=True, return_softmax_lse=True, **more)
        for cache, right in zip(caches, expected, strict=True):
            assert torch.equal(cache.view(torch.int16), right.view(torch.int16))
        expected_of(asked, Call(own_q, *expected, table, lengths + new)).judge(*made)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
def test_chunks_equal_one_call(chunk: int, invariant: bool):
    """A prompt that is appended and attended in chunks; to the bit where a call is batch-invariant."""
    asked, tokens = Asked(), 2100 if DEVICE != "cpu" else 150
    normal = bfloat16()
    q, (k, v) = normal(2, tokens, 8, 128), normal(2, 2, tokens, 2, 128)
    pages = -(-tokens // PAGE)
    table = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(0)).view(2, pages).to(DEVICE, torch.int32)
    caches = [torch.full((2 * pages, PAGE, 2, 128), NAN, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
    made = []
    for first in range(0, tokens, chunk):
        part, lengths = slice(first, first + chunk), torch.full((2,), first, dtype=torch.int32, device=DEVICE)
        asked_now: dict[str, Any] = {"cache_seqlens": lengths, "block_table": table, "batch_invariant": invariant}
        arrays = q[:, part], *caches, k[:, part], v[:, part]
        made.append(fa.flash_attn_with_kvcache(*arrays, **asked_now, causal=True, return_softmax_lse=True))
    out, lse = torch.cat([each[0] for each in made], 1), torch.cat([each[1] for each in made], 2)
    options = fa.AttentionOptions(batch_invariant=invariant)
    whole = fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal(), options=options))
    if invariant:
        assert torch.equal(out, whole.out)
        assert torch.equal(lse, whole.lse)
    expected = expected_of(asked, Call(q, *caches, table, int32([tokens, tokens])))
    expected.judge(out, lse)
    expected.judge(whole.out, whole.lse)


@pytest.mark.parametrize("poison", [NAN, float("inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_past_lengths_1_and_3_of_3_is_read(causal: bool, poison: float, family: Family):
    """In pages of 3 slots, which TMA cannot gather, and of 8; and in rows of as many slots without pages."""
    asked = Asked(causal=causal)
    for size in (3, 8):
        call = call_of(asked, [1, 3], asked.queries(family), page=size, pages=2)
        call.table = int32([[1], [0]])
        for cache in (call.k, call.v):
            cache[1, 1:] = poison
            cache[0, 3:] = poison
        expected = expected_of(asked, call)
        for splits in (0, 1, 2):
            made = fa.run(asked.request(call, splits))
            expected.judge(made.out, made.lse)
            rows = {"cache_batch_idx": call.table[:, 0].contiguous(), "num_splits": splits}
            mask = {"mask": fa.MaskKind(None, 0 if causal else None)}
            made = fa.run(fa.CachedFwdRequest(call.q, call.k, call.v, call.lengths, **rows, **mask))
            expected.judge(made.out, made.lse)
