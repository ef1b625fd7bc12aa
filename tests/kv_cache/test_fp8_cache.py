"""Caches of fp8: read with every kind of descale, written with quantised tokens, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit
from tests.cases import Alibi, Case, build
from tests.check import Run
from tests.fp8 import DTYPES, check_fp8, quantised
from tests.kv_cache.cases import CacheCase, Filled, download, fill, request_of, upload, with_plan
from tests.pairwise import covering_rows

E4M3, E5M2 = DType.F8E4M3, DType.F8E5M2
UNITS = (None, ScaleUnit.TENSOR, ScaleUnit.HEAD, ScaleUnit.BLOCK)
AXES: dict[str, tuple[Any, ...]] = {
    "q": (E4M3, E5M2, DType.BF16, DType.F16),
    "k": (E4M3, E5M2),
    "v": (E4M3, E5M2),
    "q_unit": UNITS[:3],
    "k_unit": (*UNITS, ScaleUnit.TOKEN),
    "v_unit": (*UNITS, ScaleUnit.TOKEN),
    "lengths": (
        {"lengths_q": (1, 1, 1), "lengths_k": (65, 1, 300)},
        {"lengths_q": (65, 0, 1, 9), "lengths_k": (65, 40, 200, 0)},
    ),
    "heads": ((2, 2), (4, 1), (6, 2)),
    "feature": (
        {},
        {"right": 0},
        {"left": 20, "right": 0, "sink_tokens": 2},
        {"learned_sink": True},
        {"alibi": Alibi.BATCH},
        {"softcap": 3.0},
    ),
    "cache": (
        {"block_size": 16},
        {"block_size": 3, "layout": fa.KvLayout.HND},
        {"block_size": 0, "left_pad": True},
        {"block_size": 0, "batch_idx": True},
    ),
    "order": ({}, {"num_splits": 3}, {"batch_invariant": True}, {"planned": True}),
}


def laid_out(case: CacheCase, meant: Any, cache: Filled, tokens: Any) -> Any:
    """Descales of tokens (total_k, Hkv) by the slots that the tokens have; NaN elsewhere."""
    blocks = len(cache.k)
    made = np.full((blocks, case.block_size, tokens.shape[1]), np.nan, np.float32)
    assert cache.table is not None
    for index in range(meant.batch):
        start, end = meant.cu_seqlens_k[index : index + 2]
        for slot in range(end - start):
            made[cache.table[index, slot // case.block_size], slot % case.block_size] = tokens[start + slot]
    return made


@pytest.mark.parametrize("row", covering_rows(AXES), ids=lambda row: "-".join(str(getattr(x, "value", x)) for x in row.values()))
def test_a_cache_is_read_with_its_descales(row: dict[str, Any]) -> None:
    check_row(row)


def check_row(row: dict[str, Any]) -> None:
    heads, heads_kv = row["heads"]
    call = Case(dtype=DType.F32, heads=heads, heads_kv=heads_kv, head_dim=32, v_head_dim=48, **row["lengths"], **row["feature"])
    case = CacheCase(call=call, **row["cache"], **row["order"])
    by_slot = {unit: ScaleUnit.HEAD if unit is ScaleUnit.TOKEN and not case.block_size else unit for unit in AXES["k_unit"]}
    units = (row["q_unit"] if row["q"] in {E4M3, E5M2} else None, by_slot[row["k_unit"]], by_slot[row["v_unit"]])
    made = quantised(build(call), (row["q"], row["k"], row["v"]), units)
    inputs = replace(made.meant, q=made.q, k=made.k, v=made.v)
    cache = fill(case, inputs)
    slots = case.block_size * cache.table.shape[1] if cache.table is not None else cache.k.shape[1]
    descales: dict[str, Any] = {}
    for name, unit, given in zip("qkv", units, (made.descales.get(f"{name}_descale") for name in "qkv"), strict=True):
        if unit is ScaleUnit.TOKEN:
            given = laid_out(case, made.meant, cache, given)  # noqa: PLW2901
        elif unit is ScaleUnit.BLOCK:
            given = np.pad(given, ((0, 0), (0, 0), (0, -(-slots // 128) - given.shape[2])), constant_values=np.nan)  # noqa: PLW2901
        descales[f"{name}_descale"] = upload(given)
    out = DType.BF16 if row["q"] in {E4M3, E5M2} else row["q"]
    request, written = request_of(case, inputs, cache, Fp8Options(**descales), DTYPES[out])
    output = fa.run(with_plan(request) if case.planned else request)
    assert output.out is written
    o, lse = download(output.out), download(output.lse)
    if o.ndim == 4:
        o, lse = o.reshape(made.meant.out_shape), lse.transpose(1, 0, 2).reshape(made.meant.lse_shape)
    check_fp8(str(case), made, Run(o, lse), out)


B, HKV, D, NEW, BLOCK_SIZE, ENTRIES = 2, 2, 32, 5, 16, 12
BEFORE = np.array([126, 30], np.int32)  # the new tokens of the first sequence cross from one block of 128 to the next


def pages(dtype: DType) -> tuple[Any, Any, Any]:
    """K and V, and their table, all of other values."""
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((B * ENTRIES, BLOCK_SIZE, HKV, D)).astype(DTYPES[dtype]) for _ in range(2))
    return k, v, rng.permutation(B * ENTRIES).astype(np.int32).reshape(B, ENTRIES)


def new_tokens(dtype: Any = ml_dtypes.bfloat16, spread: float = 3.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(4)
    q, k, v = (spread * rng.standard_normal((B, NEW, heads, D)) for heads in (2 * HKV, HKV, HKV))
    k[0, 1, 0] = 0  # a token without an element that is not 0
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def places(table: Any) -> tuple[Any, Any]:
    """Page and slot of each new token, (B, NEW)."""
    slots = BEFORE[:, None] + np.arange(NEW)
    return np.take_along_axis(table, slots // BLOCK_SIZE, axis=1), slots % BLOCK_SIZE


def quantised_by_hand(rows: Any, scale: Any, dtype: DType) -> Any:
    """``rows`` (B, NEW, HKV, D) over ``scale`` (B, NEW, HKV)."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    return np.clip(rows.astype(np.float32) / scale[..., None], -largest, largest).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("unit", [*UNITS, ScaleUnit.TOKEN], ids=str)
def test_new_tokens_are_quantised_where_they_belong_and_nothing_else_is_written(unit: ScaleUnit | None, dtype: DType) -> None:
    k_cache, v_cache, table = pages(dtype)
    before = [x.copy() for x in (k_cache, v_cache)]
    q, k, v = new_tokens(spread=300.0)  # beyond what e4m3 holds without a descale
    rng = np.random.default_rng(5)
    shapes = {ScaleUnit.TENSOR: (), ScaleUnit.HEAD: (B, HKV), ScaleUnit.BLOCK: (B, HKV, 2), ScaleUnit.TOKEN: k_cache.shape[:3]}
    descales = {name: None if unit is None else np.asarray(rng.uniform(0.5, 2, shapes[unit]), np.float32) for name in "kv"}
    untouched = {name: None if given is None else given.copy() for name, given in descales.items()}
    options = Fp8Options(k_descale=descales["k"], v_descale=descales["v"])
    request = fa.CachedFwdRequest(q, k_cache, v_cache, BEFORE, k, v, block_table=table, mask=fa.MaskKind.causal(), fp8=options)
    made = fa.run(request).out
    page, slot = places(table)
    for name, cache, was, rows in (("k", k_cache, before[0], k), ("v", v_cache, before[1], v)):
        given = descales[name]
        scale = np.ones((B, NEW, HKV), np.float32)
        if unit is ScaleUnit.TOKEN:
            largest = np.float32(ml_dtypes.finfo(DTYPES[dtype]).max)
            amax = np.abs(rows.astype(np.float32)).max(axis=-1)
            scale = np.where(amax > 0, amax / largest, 1).astype(np.float32)
            np.testing.assert_array_equal(given[page, slot], scale)
            given[page, slot] = untouched[name][page, slot]
        elif unit is ScaleUnit.BLOCK:
            scale = np.stack([given[b][:, (BEFORE[b] + np.arange(NEW)) // 128].T for b in range(B)])
        elif unit is not None:
            scale = np.broadcast_to(given if unit is ScaleUnit.TENSOR else given[:, None], scale.shape)
        np.testing.assert_array_equal(given, untouched[name])
        np.testing.assert_array_equal(cache[page, slot], quantised_by_hand(rows, scale, dtype))
        was[page, slot] = cache[page, slot]
        assert cache.tobytes() == was.tobytes()
        if unit is ScaleUnit.TOKEN:
            given[page, slot] = scale
    again = fa.PagedAttentionRequest(q, k_cache, v_cache, table, BEFORE + NEW, mask=fa.MaskKind.causal(), fp8=options)
    np.testing.assert_array_equal(fa.run(again).out, made)


def test_tokens_of_the_types_of_the_cache_are_copied() -> None:
    k_cache, v_cache, table = pages(E4M3)
    q, k, v = new_tokens(DTYPES[E4M3])
    slots = np.ones(k_cache.shape[:3], np.float32)
    slots.flags.writeable = False
    made = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=BEFORE, block_table=table, causal=True, k_descale=slots, v_descale=slots
    )
    assert made.dtype == ml_dtypes.bfloat16
    page, slot = places(table)
    np.testing.assert_array_equal(k_cache[page, slot], k)
    np.testing.assert_array_equal(v_cache[page, slot], v)


def test_keys_are_turned_before_they_are_quantised() -> None:
    k_cache, v_cache, table = pages(E4M3)
    wide = [np.zeros(x.shape, ml_dtypes.bfloat16) for x in (k_cache, v_cache)]
    q, k, v = new_tokens()
    angle = np.random.default_rng(6).uniform(0, 6, (200, D // 2)).astype(np.float32)
    rotary = {"rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
    scale = np.full((B, HKV), 0.25, np.float32)
    more: dict[str, Any] = {"cache_seqlens": BEFORE, "block_table": table, "causal": True, **rotary}
    fa.flash_attn_with_kvcache(q, *wide, k, v, **more)
    fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, k_descale=scale, v_descale=scale, **more)
    page, slot = places(table)
    turned = wide[0][page, slot]
    np.testing.assert_array_equal(k_cache[page, slot], quantised_by_hand(turned, np.full((B, NEW, HKV), 0.25, np.float32), E4M3))


def test_chunks_are_quantised_into_a_contiguous_cache() -> None:
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((11, heads, D)).astype(np.float16) for heads in (4, 2, 2))
    k_cache, v_cache = (np.zeros((2, 40, 2, D), DTYPES[E5M2]) for _ in range(2))
    chunks = [fa.ChunkLayout(4), fa.ChunkLayout(7)]
    options = Fp8Options(k_descale=np.full((2, 2), 0.5, np.float32), v_descale=np.asarray(2, np.float32))
    made = fa.run(fa.ChunkedPrefillRequest(q, k, v, k_cache, v_cache, chunks=chunks, fp8=options)).out
    ends = fa.CumulativeSeqlens(np.array([0, 4, 11], np.int32), 7)
    own = [(x.astype(np.float32) / scale).astype(DTYPES[E5M2]) for x, scale in ((k, 0.5), (v, 2))]
    request = fa.VarlenFwdRequest(q, *own, cu_seqlens_q=ends, mask=fa.MaskKind.causal(), fp8=options)
    assert made.dtype == np.float16
    np.testing.assert_array_equal(made, fa.run(request).out)


def cached(q: Any = None, k: Any = None, v: Any = None, **more: Any) -> Any:
    """A call that appends tokens of 16 bits to pages of e4m3."""
    k_cache, v_cache, table = pages(E4M3)
    own = new_tokens()
    given = [mine if x is None else x for x, mine in zip((q, k, v), own, strict=True)]
    return fa.CachedFwdRequest(given[0], k_cache, v_cache, BEFORE, *given[1:], block_table=table, **more)


def slots() -> Any:
    return np.ones((B * ENTRIES, BLOCK_SIZE, HKV), np.float32)


def read_only() -> Any:
    made = slots()
    made.flags.writeable = False
    return made


SHARED = slots()
ROTARY = {"rotary_cos": np.ones((200, 4), np.float32), "rotary_sin": np.ones((200, 4), np.float32)}
NARROW = new_tokens(DTYPES[E4M3])
REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "two new types": (fa.DTypeError, "k, v: got types bfloat16 and float8_e4m3fn", lambda: cached(v=NARROW[2])),
    "other new type": (fa.DTypeError, "or bfloat16 in both", lambda: cached(k=new_tokens(np.float16)[1], v=new_tokens(np.float16)[2])),
    "other format": (fa.DTypeError, "k, v: got types float8_e5m2", lambda: cached(k=new_tokens(DTYPES[E5M2])[1], v=NARROW[2])),
    "rotary of q": (fa.RotaryError, "got it with float8_e4m3fn in q", lambda: cached(q=NARROW[0], **ROTARY)),
    "rotary of k": (fa.RotaryError, "got it with float8_e4m3fn in k", lambda: cached(k=NARROW[1], v=NARROW[2], **ROTARY)),
    "read only": (fa.OutputError, "k_descale: got a read-only NumPy array", lambda: cached(fp8=Fp8Options(k_descale=read_only()))),
    "expanded": (
        fa.OutputError,
        "v_descale: got (a read-only NumPy array|strides)",
        lambda: cached(fp8=Fp8Options(v_descale=np.broadcast_to(slots()[:, :, :1], slots().shape))),
    ),
    "one array": (
        fa.OutputError,
        "k_descale: got memory of another argument",
        lambda: cached(fp8=Fp8Options(k_descale=SHARED, v_descale=SHARED)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_appended_is_refused(name: str) -> None:
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_a_descale_in_the_memory_of_the_cache_is_refused() -> None:
    k_cache, v_cache, table = pages(E4M3)
    q, k, v = new_tokens()
    inside = k_cache.reshape(-1)[: 4 * B * HKV].view(np.float32).reshape(B, HKV)
    with pytest.raises(fa.OutputError, match="k_descale: got memory of a cache"):
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=BEFORE, block_table=table, k_descale=inside)


@pytest.mark.parametrize("layout", list(fa.KvLayout), ids=lambda layout: layout.value)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_paged_cache_quantises_by_token_and_answers_with_its_descales(layout: fa.KvLayout, library: str) -> None:
    torch = pytest.importorskip("torch") if library == "torch" else None
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((37, heads, D)).astype(np.float16) for heads in (4, 2, 2))
    like = np.zeros(0, np.float16) if torch is None else torch.zeros(0, dtype=torch.float16)
    turn = (lambda x: x) if torch is None else torch.from_numpy
    caches = [fa.PagedKvCache(9, 8, 2, D, dtype=dtype, layout=layout, like=like) for dtype in (E4M3, DType.F16)]
    for cache in caches:
        first, second = cache.allocate(), cache.allocate()
        cache.append([first, second], turn(k[:30]), turn(v[:30]), [21, 9])
        third = cache.fork(first)  # whose last page is shared, until one of them writes
        cache.append([third], turn(k[None, 30:]), turn(v[None, 30:]))
    made, wide = (cache.request(turn(q[None, :7]), [2]) for cache in caches)
    assert made.problem.descales.k.unit is made.problem.descales.v.unit is ScaleUnit.TOKEN
    exact, got = (np.asarray(fa.run(each).out, np.float32) for each in (wide, made))
    assert np.linalg.norm(got - exact) < 0.06 * np.linalg.norm(exact)
    wide_out = caches[0].request(turn(q[None, :7]), [2], fp8=Fp8Options(out_dtype=DType.F32))
    assert "float32" in str(fa.run(wide_out).out.dtype)
    alone = [np.asarray(fa.run(cache.request(turn(q[None, :7]), [0])).out, np.float32) for cache in caches]
    assert np.linalg.norm(alone[0] - alone[1]) < 0.06 * np.linalg.norm(alone[1]), "the fork wrote into the page that was shared"


def test_a_paged_cache_of_fp8_takes_no_fp8() -> None:
    cache = fa.PagedKvCache(4, 8, 2, 32, dtype=E5M2)
    assert fa.PagedKvCache(4, 8, 2, 32, dtype=DType.F16).k_descale is None
    rows = np.zeros((1, 3, 2, 32), DTYPES[E5M2])
    with pytest.raises(fa.DTypeError, match="k: got float8_e5m2 on cpu; allowed is float16 or bfloat16 or float32 on cpu, to be quantised"):
        cache.append(cache.allocate(), rows, rows)


def test_options_of_a_call_over_a_paged_cache_have_no_descales_of_k_and_v() -> None:
    cache = fa.PagedKvCache(4, 8, 2, 32, dtype=E4M3)
    q, sequence = np.zeros((1, 1, 2, 32), np.float16), cache.allocate()
    for wrong in ({"k_descale": None}, np.ones(2)):
        with pytest.raises(fa.ArrayTypeError, match=r"fp8: got (dict|ndarray); allowed is an Fp8Options, or None"):
            cache.request(q, sequence, fp8=wrong)
    with pytest.raises(fa.ShapeError, match="fp8: got a k_descale or a v_descale; allowed are those of the cache"):
        cache.request(q, sequence, fp8=Fp8Options(v_descale=np.ones((1, 2), np.float32)))
