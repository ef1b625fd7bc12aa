"""Batch invariance: one sequence asked in many ways, whose rows must have the same bits. On the device of tests/kv_cache/cases.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import atomr_accel_flashattn as fa
from tests.kv_cache import cases

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["CASES", "WAYS", "Asked", "check_against_plain", "check_way", "tokens_of"]

CAUSAL = fa.MaskKind.causal()
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sequence of ``tokens`` tokens, and what is asked of it."""

    name: str
    tokens: int = 150
    heads: int = 2
    heads_kv: int = 1
    head_dim: int = 32
    mask: fa.MaskKind = CAUSAL
    sink_tokens: int = 0
    softcap: float = 0.0
    scale: float | None = None
    slopes: bool = False
    learned_sink: bool = False
    bfloat16: bool = False
    loud: tuple[int, ...] = field(default=())  # queries with huge scores
    # Types of q (None: 16 bits), k and v in fp8, which then have descales by blocks of tokens, and q by heads.
    fp8: tuple[Any, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.name}-invariant"


# Windows of more than four tiles of 32 keys: four groups of warps share them, and sums of three numbers have an order.
CASES = (
    Asked(name="causal", loud=(77, 20)),
    Asked(name="window", mask=fa.MaskKind.sliding_causal(150), tokens=260, loud=(101,)),
    Asked(name="sinks", mask=fa.MaskKind.sliding_causal(130), tokens=230, sink_tokens=37, learned_sink=True),
    Asked(name="both sides", mask=fa.MaskKind.window(130, 9), tokens=190, heads=5),
    Asked(name="full", mask=fa.MaskKind.full(), heads=2, heads_kv=2, loud=(140,), bfloat16=True),
    Asked(name="alibi", slopes=True, heads=3, bfloat16=True),
    Asked(name="softcap", softcap=4.0, learned_sink=True, loud=(60,)),
    Asked(name="everything", mask=fa.MaskKind.sliding_causal(110), sink_tokens=3, slopes=True, softcap=20.0, learned_sink=True, loud=(88,)),
    Asked(name="negative scale", scale=-0.3, head_dim=40, heads=4, heads_kv=2, loud=(30,)),
    Asked(name="wide", head_dim=128, tokens=100, loud=(90,)),
    Asked(name="fp8 keys", fp8=(None, E4M3, E5M2), tokens=290, heads=4, heads_kv=2, bfloat16=True, loud=(277,)),
    Asked(name="fp8", fp8=(E4M3, E5M2, E4M3), tokens=270, mask=fa.MaskKind.sliding_causal(150), sink_tokens=5, learned_sink=True),
)


@dataclass(frozen=True)
class Tokens:
    """(tokens, heads, head dim) each, slopes and sinks by head."""

    q: Array
    k: Array
    v: Array


@dataclass(frozen=True)
class Rows:
    """Some rows of the sequence: positions, o (rows, heads, Dv) and the LSE (rows, heads)."""

    positions: range
    out: Array
    lse: Array


def tokens_of(asked: Asked, seed: int = 0, length: int | None = None) -> Tokens:
    """Another ``seed`` is another sequence."""
    random = np.random.default_rng((seed, asked.head_dim))
    length = asked.tokens if length is None else length
    dtype = ml_dtypes.bfloat16 if asked.bfloat16 else np.float16
    q, k, v = (random.standard_normal((length, heads, asked.head_dim)) for heads in (asked.heads, asked.heads_kv, asked.heads_kv))
    for loud in asked.loud:
        if loud + 3 < length:
            q[loud, :1] *= 8000  # of one head: such scores may not change how those beside them are rounded
            q[loud + 1 : loud + 3] *= 300  # large enough to show it
    kinds = (each or dtype for each in asked.fp8 or (None,) * 3)
    return Tokens(*(x.astype(kind) for x, kind in zip((q, k, v), kinds, strict=True)))


def descales_of(asked: Asked, tokens: int, seed: int = 0) -> dict[str, Array]:
    """Those of a sequence with so many keys: (Hkv,) of q where it is fp8, (Hkv, blocks) of k and of v."""
    if not asked.fp8:
        return {}
    random = np.random.default_rng((seed, 9))
    heads, blocks = asked.heads_kv, -(-tokens // 128)
    # As many numbers as of the longest, so that fewer keys have the same.
    q, k, v = random.uniform(0.4, 2, heads), *random.uniform(0.4, 2, (2, heads, 8))
    found = {"k_descale": k[:, :blocks], "v_descale": v[:, :blocks]} | ({"q_descale": q} if asked.fp8[0] else {})
    return {name: x.astype(np.float32) for name, x in found.items()}


def per_head(asked: Asked, make: Callable[[int], Array], *, wanted: bool) -> Any:
    return cases.upload(make(asked.heads).astype(np.float32)) if wanted else None


def options_of(asked: Asked, tokens: int | None = None, seeds: tuple[int, ...] = (0,), *, invariant: bool = True) -> dict[str, Any]:
    """``tokens``: keys of the longest sequence, None is all of the one that is asked for; ``seeds``: those of the sequences of the call."""
    descales = [descales_of(asked, asked.tokens if tokens is None else tokens, seed) for seed in seeds]
    fp8 = {name: cases.upload(np.stack([each[name] for each in descales])) for name in descales[0]}
    return {
        "fp8": fa.Fp8Options(**fp8, out_dtype=fa.DType.F32) if fp8 else None,  # 16 bits would hide most roundings
        "mask": asked.mask,
        "sink_tokens": asked.sink_tokens,
        "bias": fa.PositionBias(per_head(asked, lambda n: 0.5 ** np.arange(1, n + 1), wanted=asked.slopes)),
        "options": fa.AttentionOptions(
            softcap=asked.softcap,
            softmax_scale=asked.scale,
            learned_sink=per_head(asked, lambda n: np.linspace(-1, 3, n), wanted=asked.learned_sink),
            batch_invariant=invariant,
        ),
    }


def rows_of(request: Any, positions: range, batch: int = 0) -> Rows:
    """Those of one sequence of a dense q."""
    made = fa.run(request)
    return Rows(positions, cases.download(made.out)[batch], cases.download(made.lse)[batch].T)


def dense(asked: Asked, *, invariant: bool = True) -> Rows:
    """The sequence alone, in one call."""
    one = tokens_of(asked)
    q, k, v = (cases.upload(x[None]) for x in (one.q, one.k, one.v))
    return rows_of(fa.DenseFwdRequest(q, k, v, **options_of(asked, invariant=invariant)), range(asked.tokens))


def _in_a_batch(asked: Asked) -> Iterator[Rows]:
    several = [tokens_of(asked, seed) for seed in (3, 0, 4)]
    q, k, v = (cases.upload(np.stack([getattr(each, name) for each in several])) for name in "qkv")
    yield rows_of(fa.DenseFwdRequest(q, k, v, **options_of(asked, seeds=(3, 0, 4))), range(asked.tokens), 1)


def _packed(asked: Asked) -> Iterator[Rows]:
    """Between others, with spare rows behind."""
    lengths = [5, asked.tokens, 9]
    several = [tokens_of(asked, seed, length) for seed, length in zip((3, 0, 4), lengths, strict=True)]
    q, k, v = (cases.upload(np.concatenate([getattr(each, name) for each in several] + [getattr(several[2], name)])) for name in "qkv")
    offsets = fa.CumulativeSeqlens(cases.upload(np.cumsum([0, *lengths]).astype(np.int32)), max(lengths))
    made = fa.run(fa.VarlenFwdRequest(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, **options_of(asked, seeds=(3, 0, 4))))
    own = slice(5, 5 + asked.tokens)
    yield Rows(range(asked.tokens), cases.download(made.out)[own], cases.download(made.lse)[:, own].T)


def paged(asked: Asked, size: int, parts: list[range], *, others: bool = False) -> Iterator[Rows]:
    """Each part of the queries in a call on pages in disorder, which hold no later token; ``others``: beside short ones in the batch."""
    one = tokens_of(asked)
    for part in parts:
        random = np.random.default_rng((size, part.start))
        length = part.stop
        pages = random.permutation(-(-length // size) + 4).astype(np.int32)
        cache = [np.full((len(pages), size, *x.shape[1:]), np.nan, x.dtype) for x in (one.k, one.v)]
        for slot in range(length):
            for pool, x in zip(cache, (one.k, one.v), strict=True):
                pool[pages[slot // size], slot % size] = x[slot]
        k, v = map(cases.upload, cache)
        q = one.q[None, part.start : part.stop]
        table, lengths, batch = pages[None, : len(pages) - 1], np.array([length], np.int32), 0
        if others:  # they read the same pages
            q, batch = np.concatenate([q[:, ::-1], q, (q.astype(np.float32) + 1).astype(q.dtype)]), 1
            table, lengths = np.repeat(table, 3, 0), np.array([max(1, length // 2), length, 1], np.int32)
        slots = size * table.shape[1]
        options = options_of(asked, slots, (0,) * len(q))
        request = fa.PagedAttentionRequest(*map(cases.upload, (q,)), k, v, cases.upload(table), cases.upload(lengths), **options)
        yield rows_of(request, part, batch)


def _cut(asked: Asked, size: int, some: int) -> list[range]:
    """Chunks of the sequence; at most ``some`` of them, the last among them. Later keys than a chunk's are seen by masks that do."""
    if asked.mask.right != 0:
        return [range(asked.tokens - size, asked.tokens)]
    chunks = [range(start, min(start + size, asked.tokens)) for start in range(0, asked.tokens, size)]
    return [chunks[i] for i in sorted({round(at) for at in np.linspace(0, len(chunks) - 1, some)})]


def _in_a_slot(asked: Asked) -> Iterator[Rows]:
    """A contiguous cache with left padding; the sequence has row 2."""
    one, pad = tokens_of(asked), 5
    cache = [np.full((3, asked.tokens + 11, *x.shape[1:]), np.nan, x.dtype) for x in (one.k, one.v)]
    for pool, x in zip(cache, (one.k, one.v), strict=True):
        pool[2, pad : pad + asked.tokens] = x
    q, k, v = map(cases.upload, (one.q[None], *cache))
    lengths, row, padding = (cases.upload(np.array([x], np.int32)) for x in (asked.tokens + pad, 2, pad))
    request = fa.CachedFwdRequest(q, k, v, lengths, cache_batch_idx=row, cache_leftpad=padding, **options_of(asked, asked.tokens + 11))
    yield rows_of(request, range(asked.tokens))


def _short(asked: Asked) -> Iterator[Rows]:
    """A prefix of the keys, with the queries that see no more: dense arrays of another length, and few rows."""
    if asked.mask.right != 0:
        return
    one = tokens_of(asked)
    for end in (1, 19, asked.tokens - 3):
        first = max(0, end - 3)
        q, k, v = (cases.upload(x[None]) for x in (one.q[first:end], one.k[:end], one.v[:end]))
        yield rows_of(fa.DenseFwdRequest(q, k, v, **options_of(asked, end)), range(first, end))


WAYS: dict[str, Callable[[Asked], Iterator[Rows]]] = {
    "in a batch": _in_a_batch,
    "packed": _packed,
    "pages of 16": lambda asked: paged(asked, 16, [range(asked.tokens)]),
    "pages of 64": lambda asked: paged(asked, 64, [range(asked.tokens)]),
    "pages of 7, beside others": lambda asked: paged(asked, 7, [range(asked.tokens)], others=True),
    "contiguous, left padding": _in_a_slot,
    "chunks of 1": lambda asked: paged(asked, 16, _cut(asked, 1, 5)),
    "chunks of 1, beside others": lambda asked: paged(asked, 64, _cut(asked, 1, 3), others=True),
    "chunks of 7": lambda asked: paged(asked, 16, _cut(asked, 7, 4)),
    "chunks of 45": lambda asked: paged(asked, 16, _cut(asked, 45, 9)),  # other blocks of rows
    "chunks of 64": lambda asked: paged(asked, 64, _cut(asked, 64, 3)),
    "fewer keys": _short,
}


def check_way(asked: Asked, way: str, whole: Rows) -> int:
    """The rows of a way have the bits that they have in ``whole``; how many rows there were."""
    count = 0
    for rows in WAYS[way](asked):
        for index, position in enumerate(rows.positions):
            for what in ("out", "lse"):
                made, expected = getattr(rows, what)[index], getattr(whole, what)[position]
                assert made.tobytes() == expected.tobytes(), f"{what} of query {position}: {made.ravel()[:4]} and {expected.ravel()[:4]}"
            count += 1
    return count


def check_against_plain(asked: Asked, whole: Rows) -> None:
    """It is attention: close to the call without the promise, on the CPU backend in float32."""
    one = tokens_of(asked)
    keep = cases.upload
    cases.upload = lambda array: array  # options in host memory
    try:
        options = options_of(asked, invariant=False)
    finally:
        cases.upload = keep
    q, k, v = (x[None].astype(np.float32) for x in (one.q, one.k, one.v))
    if asked.fp8:
        options["fp8"], descales = None, descales_of(asked, asked.tokens)
        q *= np.repeat(descales.get("q_descale", np.ones(asked.heads_kv, np.float32)), asked.heads // asked.heads_kv)[:, None]
        k, v = (x * np.repeat(descales[name].T, 128, axis=0)[: asked.tokens, :, None] for x, name in ((k, "k_descale"), (v, "v_descale")))
    plain = fa.run(fa.DenseFwdRequest(q, k, v, **options))
    quiet = [i for i in range(asked.tokens) if not any(loud <= i < loud + 3 for loud in asked.loud)]
    rounding = 0.1 if asked.fp8 and asked.fp8[0] else 2e-2 if asked.bfloat16 else 3e-3
    np.testing.assert_allclose(whole.out[quiet].astype(np.float32), plain.out[0][quiet], atol=2 * rounding, rtol=rounding)
    np.testing.assert_allclose(whole.lse[quiet], plain.lse[0].T[quiet], atol=1e-3, rtol=1e-4)
