"""What a call on a KV cache refuses, each by name, with the cache as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.dispatch import choice
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, KvCacheParams, cache_numbers
from atomr_accel_flashattn.limits import MAX_LENGTH
from atomr_accel_flashattn.types import SmArch
from tests.fakes.arrays import FakeArray


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


Q, NEW = normal(2, 3, 4, 8), normal(2, 3, 2, 8)
K, PAGES = normal(2, 64, 2, 8), normal(9, 16, 2, 8)
TABLE, LENGTHS = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([5, 9], np.int32)
COS = np.ones((64, 4), np.float16)


@dataclass(frozen=True)
class Refused:
    """``change`` is what is wrong with a call that is otherwise right: contiguous, or paged."""

    error: type[Exception]
    message: str
    change: dict[str, Any]
    paged: bool = False

    def call(self) -> Any:
        cache = PAGES if self.paged else K
        given = {"q": Q, "k_cache": cache.copy(), "v_cache": cache.copy(), "cache_seqlens": LENGTHS, "k": NEW, "v": NEW}
        given |= {"block_table": TABLE} if self.paged else {}
        given |= self.change
        before = [given[name].tobytes() if isinstance(given[name], np.ndarray) else None for name in ("k_cache", "v_cache")]
        try:
            return fa.flash_attn_with_kvcache(**given)
        finally:
            after = [given[name].tobytes() if isinstance(given[name], np.ndarray) else None for name in ("k_cache", "v_cache")]
            assert before == after or not self.message, "the cache was written to"


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


BOTH, POOL, SPARE = normal(2, 64, 2, 8), normal(9, 16, 2, 8), np.zeros_like(Q)
REFUSED = {
    "rank of q": Refused(fa.ShapeError, r"q: got shape \(3, 4, 8\); allowed is \(batch", {"q": Q[0]}),
    "rank of a cache": Refused(fa.ShapeError, "k_cache", {"k_cache": K[0]}),
    "slots of v_cache": Refused(fa.ShapeError, r"v_cache: got \(2, 63\) blocks and slots with \(2, 64\)", {"v_cache": K[:, :63]}),
    "rows": Refused(fa.ShapeError, "k_cache: got 1 rows for 2 sequences", {"k_cache": K[:1], "v_cache": K[:1]}),
    "type of a cache": Refused(fa.DTypeError, "k_cache: got type float32 with float16 in q", {"k_cache": K.astype(np.float32)}),
    "fp8 for a cache of 16 bits": Refused(
        fa.DTypeError,
        "k, v: got types float8_e4m3fn and float8_e4m3fn; allowed are those of the cache, float16 and float16$",
        {"k": NEW.astype(ml_dtypes.float8_e4m3fn), "v": NEW.astype(ml_dtypes.float8_e4m3fn)},
    ),
    "heads of new": Refused(fa.ShapeError, "k, v: got 1 KV heads", {"k": NEW[:, :, :1], "v": NEW[:, :, :1]}),
    "width of new": Refused(fa.ShapeError, "v head dim 4; allowed are those of the cache", {"v": NEW[..., :4]}),
    "batch of new": Refused(fa.ShapeError, "v: got shape", {"k": NEW[:1], "v": NEW[:1]}),
    "k alone": Refused(fa.ShapeError, "v: got None; allowed are new k and v together", {"v": None}),
    "v alone": Refused(fa.ShapeError, "k: got None; allowed are new k and v together", {"k": None}),
    "no lengths": Refused(fa.SeqLensError, "cache_seqlens: got None with k", {"cache_seqlens": None}),
    "negative": Refused(fa.SeqLensError, r"cache_seqlens: got -1; allowed are 0..64", {"cache_seqlens": -1}),
    "a number that is too large": Refused(fa.SeqLensError, r"cache_seqlens: got 65; allowed are 0..64", {"cache_seqlens": 65}),
    "a negative length": Refused(fa.SeqLensError, "got -1 tokens and 3 new", {"cache_seqlens": np.array([3, -1], np.int32)}),
    "62 and 3": Refused(
        fa.SeqLensError, r"got 62 tokens and 3 new tokens in sequence 1; .*0..64 .*4 blocks of 16",
        {"cache_seqlens": np.array([61, 62], np.int32)}, paged=True,
    ),
    "65 of 4 pages": Refused(
        fa.SeqLensError, "got 65 tokens in sequence 0", {"cache_seqlens": np.array([65, 1], np.int32), "k": None, "v": None}, paged=True
    ),
    "more new tokens than slots": Refused(
        fa.SeqLensError, "k: got 65 new tokens; allowed are at most 64, .*sequence$", {"k": normal(2, 65, 2, 8), "v": normal(2, 65, 2, 8)}
    ),
    "a table made before the pages": Refused(
        fa.SeqLensError, "got 3 new tokens; allowed are at most 0, .*; reserve pages", {"block_table": TABLE[:, :0]}, paged=True
    ),
    "type of lengths": Refused(fa.DTypeError, "cache_seqlens: got type int64; allowed is int32", {"cache_seqlens": np.array([5, 9])}),
    "shape of lengths": Refused(fa.SeqLensError, r"cache_seqlens: got shape \(3,\)", {"cache_seqlens": np.array([5, 9, 1], np.int32)}),
    "a bool": Refused(fa.ArrayTypeError, "cache_seqlens: got", {"cache_seqlens": True}),
    "type of a table": Refused(fa.DTypeError, "block_table: got type int64", {"block_table": TABLE.astype(np.int64)}, paged=True),
    "shape of a table": Refused(fa.BlockTableError, r"block_table: got shape \(1, 4\)", {"block_table": TABLE[:1]}, paged=True),
    "strides of a table": Refused(
        fa.BlockTableError, "block_table: got strides", {"block_table": np.repeat(TABLE, 2, 1)[:, ::2]}, paged=True
    ),
    "rows with pages": Refused(
        fa.BlockTableError, "cache_batch_idx: got an array with a block_table", {"cache_batch_idx": LENGTHS}, paged=True
    ),
    "padding with pages": Refused(
        fa.BlockTableError, "cache_leftpad: got an array with a block_table", {"cache_leftpad": LENGTHS}, paged=True
    ),
    "a row that is none": Refused(
        fa.BlockTableError, r"cache_batch_idx: got 2 for sequence 1; allowed are 0..1", {"cache_batch_idx": np.array([0, 2], np.int32)}
    ),
    "padding beyond the length": Refused(
        fa.SeqLensError, "cache_leftpad: got 6 slots in sequence 0 with 5 in use", {"cache_leftpad": np.array([6, 0], np.int32)}
    ),
    "rotary without keys": Refused(fa.RotaryError, "without new keys", {"rotary_cos": COS, "rotary_sin": COS, "k": None, "v": None}),
    "cos without sin": Refused(fa.RotaryError, "rotary_sin: got None; allowed are cos and sin together", {"rotary_cos": COS}),
    "rotary of too few rows": Refused(
        fa.RotaryError, "rotary_cos: got 11 rows; allowed are at least 12", {"rotary_cos": COS[:11], "rotary_sin": COS[:11]}
    ),
    "rotary of more rows for q": Refused(
        fa.RotaryError, "at least 12",
        {"rotary_cos": COS[:11], "rotary_sin": COS[:11], "causal": True, "k": NEW[:, :1], "v": NEW[:, :1]},
    ),
    "rotary wider than a head": Refused(
        fa.RotaryError, r"rotary_cos: got shape \(64, 5\)", dict.fromkeys(("rotary_cos", "rotary_sin"), np.ones((64, 5), np.float16))
    ),
    "rotary of two sizes": Refused(fa.RotaryError, "rotary_sin: got float16", {"rotary_cos": COS, "rotary_sin": COS[:, :2].copy()}),
    "rotary of another type": Refused(fa.DTypeError, "rotary_cos: got type float64", {"rotary_cos": COS.astype(float), "rotary_sin": COS}),
    "rotary with gaps": Refused(
        fa.StrideError, "rotary_cos: got strides", {"rotary_cos": np.ones((64, 8), np.float16)[:, ::2], "rotary_sin": COS}
    ),
    "splits": Refused(fa.SplitError, r"num_splits: got 129; allowed is an integer in 0..128", {"num_splits": 129}),
    "negative splits": Refused(fa.SplitError, "num_splits: got -1", {"num_splits": -1}),
    "splits of no integer": Refused(fa.SplitError, "num_splits: got 2.0", {"num_splits": 2.0}),
    "splits of an invariant call": Refused(fa.SplitError, "got 2 with batch_invariant=True", {"num_splits": 2, "batch_invariant": True}),
    "a flag": Refused(fa.UnsupportedArgumentError, "rotary_interleaved: got 'no'", {"rotary_interleaved": "no"}),
    "another flag": Refused(fa.UnsupportedArgumentError, "return_softmax_lse: got None", {"return_softmax_lse": None}),
    "read-only": Refused(fa.OutputError, "v_cache: got a read-only NumPy array", {"v_cache": read_only(K)}),
    "one cache for both": Refused(
        fa.OutputError, "k_cache: got elements that share memory, or that of the other", {"k_cache": BOTH, "v_cache": BOTH}
    ),
    "new tokens in the cache": Refused(
        fa.OutputError, "k_cache: got memory of q, k or v", {"k_cache": BOTH, "k": BOTH[:, :3]}
    ),
    "out of another shape": Refused(fa.OutputError, "out: got float16 of shape", {"out": Q[:1]}),
    "a cache in its lengths": Refused(
        fa.OutputError, "k_cache: got memory of lengths, a table", {"cache_seqlens": BOTH.view(np.int32).reshape(-1)[:2], "k_cache": BOTH}
    ),
    "a cache in its table": Refused(
        fa.OutputError, "v_cache: got memory of lengths, a table",
        {"block_table": POOL.view(np.int32).reshape(-1)[:8].reshape(2, 4), "v_cache": POOL}, paged=True,
    ),
    "a cache in slopes": Refused(
        fa.OutputError, "k_cache: got memory of lengths, .* slopes",
        {"alibi_slopes": BOTH.view(np.float32).reshape(-1)[:4], "k_cache": BOTH},
    ),
    "out in lengths": Refused(
        fa.OutputError, "out: got memory of lengths, a table", {"cache_seqlens": SPARE.view(np.int32).reshape(-1)[:2], "out": SPARE}
    ),
    "out in rotary embedding": Refused(
        fa.OutputError, "out: got memory of lengths, .* rotary embedding",
        {"rotary_cos": SPARE.reshape(-1)[:48].reshape(12, 4), "rotary_sin": COS[:12], "out": SPARE},
    ),
    "out in new tokens": Refused(fa.OutputError, "out: got the memory of q, k or v", {"q": NEW.copy(), "out": NEW}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    refused = REFUSED[name]
    with pytest.raises(refused.error, match=refused.message):
        refused.call()


def test_what_just_fits_is_done():
    for paged in (False, True):
        for change in ({"cache_seqlens": np.array([61, 61], np.int32)}, {"cache_seqlens": 64, "k": None, "v": None}):
            assert np.isfinite(Refused(Exception, "", change, paged).call()).all()
    exact = {"rotary_cos": COS[:12], "rotary_sin": COS[:12]}
    assert Refused(Exception, "", exact).call().shape == Q.shape


def test_lengths_that_were_written_to_are_looked_at_again():
    lengths = LENGTHS.copy()
    request = fa.CachedFwdRequest(Q, K.copy(), K.copy(), lengths, NEW, NEW)
    lengths[1] = 62
    before = request.k_cache.tobytes()
    with pytest.raises(fa.SeqLensError, match=r"got 62 tokens and 3 new tokens in sequence 1"):
        fa.run(request)
    assert request.k_cache.tobytes() == before


def test_layouts_and_bounds_of_requests():
    paged = {"q": Q, "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE, "seq_lens": LENGTHS}
    for change, error, message in (
        ({"layout": "NHD"}, fa.BlockTableError, "layout: got 'NHD'; allowed are KvLayout.NHD and KvLayout.HND"),
        ({"max_seqlen_k": 8}, fa.SeqLensError, "max_seqlen_k: got 8, and a sequence has 9 tokens"),
        ({"max_seqlen_k": -1}, fa.SeqLensError, "max_seqlen_k: got -1"),
        ({"k_cache": PAGES[:, :0], "v_cache": PAGES[:, :0]}, fa.ShapeError, "got blocks of 0 slots"),
        (
            {"cu_seqlens_q": fa.CumulativeSeqlens(np.array([0, 1], np.int32))},
            fa.ShapeError,
            r"q: got shape .* of rank 4; allowed is rank 3",
        ),
        ({"options": fa.AttentionOptions(dropout_p=0.1)}, fa.DropoutError, "dropout_p: got 0.1 with a KV cache; allowed is 0"),
        ({"seq_lens": fa.CumulativeSeqlens.from_lengths([1, 2, 3])}, fa.CuSeqlensError, "cu_seqlens_k: got 3 sequences with 2 in q"),
        ({"sink_tokens": 2}, fa.SinkWithoutMaskError, "sink_tokens: got 2"),
    ):
        with pytest.raises(error, match=message):
            fa.PagedAttentionRequest(**(paged | change))
    with pytest.raises(fa.BlockTableError, match=r"with a contiguous cache; allowed is KvLayout\.NHD"):
        fa.CachedFwdRequest(Q, K, K, LENGTHS, layout=fa.KvLayout.HND)


def test_dropout_and_gradients_with_a_block_table():
    ends = np.array([0, 3, 6], np.int32)
    with pytest.raises(fa.DropoutError, match=r"dropout_p: got 0\.5 with a KV cache"):
        fa.flash_attn_varlen_func(Q.reshape(6, 4, 8), PAGES, PAGES, ends, ends, 3, 3, 0.5, block_table=TABLE)


def test_batch_invariance_is_of_the_forward():
    with pytest.raises(fa.UnsupportedArgumentError, match="batch_invariant: got True with a backward request"):
        fa.DenseBwdRequest(Q, K, K, dout=Q, recompute=True, options=fa.AttentionOptions(batch_invariant=True))
    with pytest.raises(fa.UnsupportedArgumentError, match="batch_invariant: got 1; allowed are True and False"):
        fa.AttentionOptions(batch_invariant=1)


class TestOnAGpu:
    """Requests are made there, with keys that kernels of the mma.sync family answer."""

    @pytest.fixture(autouse=True)
    def no_card(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(choice, "_runs_here", lambda *_: False)

    def request(self, **asked: Any) -> Any:
        def there(array: np.ndarray) -> Any:
            return FakeArray(array).info()

        if asked.pop("paged", True):
            return fa.PagedAttentionRequest(*map(there, (Q, PAGES, PAGES, TABLE, LENGTHS)), **asked)
        more = {name: there(value) for name, value in asked.items()}
        return fa.CachedFwdRequest(*map(there, (Q, K, K, LENGTHS)), **more)

    def test_keys(self):
        key = self.request(num_splits=4, mask=fa.MaskKind.causal()).dispatch_key(SmArch.SM_90)
        assert (key.paged, key.causal, key.gqa_ratio, key.extras.split, key.extras.kv_layout) == (True, True, 2, True, "NHD")
        assert not key.extras.kv_cache
        key = self.request(paged=False, cache_leftpad=LENGTHS).dispatch_key(SmArch.SM_90)
        assert (key.paged, key.extras.kv_cache, key.extras.left_pad, key.extras.split) == (False, True, True, False)
        options = fa.AttentionOptions(batch_invariant=True)
        assert self.request(options=options).dispatch_key(SmArch.SM_90).extras.batch_invariant
        assert isinstance(self.request(), fa.FaPagedFwdDispatch)

    def test_plan_keys_tell_caches_apart(self):
        keys = {
            self.request().plan_key,
            self.request(num_splits=2).plan_key,
            self.request(options=fa.AttentionOptions(batch_invariant=True)).plan_key,
            self.request(max_seqlen_k=10).plan_key,
            self.request(paged=False).plan_key,
            self.request(paged=False, cache_leftpad=LENGTHS).plan_key,
            self.request(paged=False, cache_batch_idx=LENGTHS).plan_key,
        }
        assert len(keys) == 7
        assert None not in keys

    @pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_90A, SmArch.SM_100])
    def test_the_mma_sync_family_answers_unless_wgmma_is_asked_for(self, arch: SmArch):
        for paged in (True, False):
            key = replace(self.request(paged=paged).dispatch_key(SmArch.SM_90), arch=arch, dtype=fa.DType.F16)
            spec = fa.lookup(replace(key, extras=replace(key.extras, family=None)))
            assert isinstance(spec, Fa2KvCacheSpec)
            assert (spec.paged, spec.arch) == (paged, SmArch.SM_90 if arch is SmArch.SM_90A else arch)
            asked = replace(key, extras=replace(key.extras, family=fa.Family.FA3))
            if arch is SmArch.SM_80:
                with pytest.raises(fa.ArchUnsupportedError, match="family: got fa3 on sm_80, which has no wgmma"):
                    fa.lookup(asked)
                continue
            spec = fa.lookup(asked)
            assert isinstance(spec, Fa3KvCacheSpec if arch is SmArch.SM_90A else Fa2KvCacheSpec)
            assert (spec.paged, spec.arch) == (paged, arch)

    def test_batch_invariance_has_a_kernel_of_its_own(self):
        key = self.request(options=fa.AttentionOptions(batch_invariant=True)).dispatch_key(SmArch.SM_90)
        spec = fa.lookup(replace(key, dtype=fa.DType.F16))
        assert isinstance(spec, Fa2KvCacheSpec)
        assert (spec.batch_invariant, spec.split, spec.paged, spec.plain_kv) == (True, False, True, False)

    @pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_90A, SmArch.SM_120])
    def test_plain_requests_have_it_too_except_of_the_wgmma_family(self, arch: SmArch):
        q = FakeArray(Q.astype(np.float16)).info()
        options = fa.AttentionOptions(batch_invariant=True)
        for kind in (fa.DenseFwdRequest, fa.Fa2FwdRequest):
            spec = fa.lookup(kind(q, q, q, options=options).dispatch_key(arch))
            assert isinstance(spec, Fa2KvCacheSpec)
            assert (spec.batch_invariant, spec.plain_kv, spec.family) == (True, True, fa.Family.FA2)
        with pytest.raises(fa.FeatureNotBuiltError) as caught:
            fa.lookup(fa.Fa3FwdRequest(q, q, q, options=options).dispatch_key(arch))
        assert caught.value.feature == "fa3_batch_invariant"
        dropped = fa.AttentionOptions(batch_invariant=True, dropout_p=0.5, rng=FakeArray(np.zeros(2, np.int64)).info())
        with pytest.raises(fa.FeatureNotBuiltError) as caught:
            fa.lookup(fa.DenseFwdRequest(q, q, q, options=dropped).dispatch_key(arch))
        assert caught.value.feature == "invariant_dropout"


def test_a_table_of_more_slots_than_kernels_count_has_as_many_as_they_do():
    pages, table = np.zeros((2, 1 << 16, 2, 8), np.float16), np.zeros((2, 1 << 15), np.int32)  # 2^31 slots
    q, k, blocks, lengths = (FakeArray(x).info() for x in (Q, pages, table, LENGTHS))
    problem = fa.PagedAttentionRequest(q, k, k, blocks, lengths).problem
    assert problem.cache is not None
    params: Any = KvCacheParams(**cache_numbers(problem, problem.cache, 1))
    assert params.capacity == problem.seqlen_k == MAX_LENGTH
