"""fp8 requests: what is taken, what is refused by name, and the key that tells types and descales."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import DType, Fp8Options, ScaleUnit, SmArch
from atomr_accel_flashattn.dispatch import key_of_problem
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.limits import BEFORE_FP8, HEAD_DIM_WIDTHS
from atomr_accel_flashattn.problem import Descales, Strides
from atomr_accel_flashattn.runtime import staleness
from atomr_accel_flashattn.runtime.plan import _facts_of_fp8

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
B, S, HQ, HKV, D = 3, 300, 4, 2, 32
GPU_ARCHS = [arch for arch in SmArch if arch is not SmArch.CPU]


def scale(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def request(q: Any = E4M3, k: Any = E4M3, v: Any = E4M3, *, head_dim: int = D, **options: Any) -> fa.DenseFwdRequest:
    """A dense request of these types; ``options`` of Fp8Options."""
    arrays = (np.zeros((B, S, heads, head_dim), dtype) for heads, dtype in ((HQ, q), (HKV, k), (HKV, v)))
    return fa.DenseFwdRequest(*arrays, fp8=Fp8Options(**options) if options else None)


def paged(*, blocks: int = 5, block_size: int = 16, **options: Any) -> fa.PagedAttentionRequest:
    q, cache = np.zeros((B, 1, HQ, D), ml_dtypes.bfloat16), np.zeros((blocks, block_size, HKV, D), E4M3)
    table, lengths = np.zeros((B, 2), np.int32), np.full(B, min(20, 2 * block_size), np.int32)
    return fa.PagedAttentionRequest(q, cache, cache, table, lengths, fp8=Fp8Options(**options))


@pytest.mark.parametrize("q", [E4M3, E5M2, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("k", "v"), [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)])
def test_types_are_free_among_the_two_formats(q: Any, k: Any, v: Any):
    problem = request(q, k, v).problem
    assert problem.descales == Descales()
    key = key_of_problem(problem, SmArch.SM_90A)
    assert (key.dtype, key.k_dtype, key.v_dtype) == tuple(array.dtype for array in (problem.q, problem.k, problem.v))
    assert key.out_dtype is problem.out_dtype
    assert problem.out_dtype is (problem.q.dtype if np.dtype(q).itemsize == 2 else DType.BF16)


@pytest.mark.parametrize(
    ("given", "unit", "strides"),
    [
        (scale(), ScaleUnit.TENSOR, Strides(0, 0, 0)),
        (scale(B, HKV), ScaleUnit.HEAD, Strides(HKV, 0, 1)),
        (np.broadcast_to(scale(1, HKV), (B, HKV)), ScaleUnit.HEAD, Strides(0, 0, 1)),
        (np.broadcast_to(scale(), (B, HKV)), ScaleUnit.HEAD, Strides(0, 0, 0)),
        (scale(B, HKV, 3), ScaleUnit.BLOCK, Strides(HKV * 3, 1, 3)),
        (scale(B, 3, HKV).swapaxes(1, 2), ScaleUnit.BLOCK, Strides(HKV * 3, HKV, 1)),
    ],
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_shape_tells_what_shares_a_descale(name: str, given: Any, unit: ScaleUnit, strides: Strides):
    made = request(**{f"{name}_descale": given})
    descale = getattr(made.problem.descales, name)
    assert (descale.unit, descale.strides, descale.array.source is given) == (unit, strides, True)
    assert getattr(key_of_problem(made.problem, SmArch.SM_90A).extras, f"{name}_descale") is unit


def test_beside_pages_a_descale_may_be_that_of_a_slot():
    made = paged(k_descale=scale(5, 16, HKV), v_descale=scale(B, HKV, 1)).problem.descales
    assert made is not None
    assert (made.k.unit, made.k.strides) == (ScaleUnit.TOKEN, Strides(32, 2, 1))
    assert (made.v.unit, made.v.strides) == (ScaleUnit.BLOCK, Strides(2, 0, 1))


def test_lengths_that_vary_leave_room_for_more_blocks_of_tokens():
    assert paged(k_descale=scale(B, HKV, 9)).problem.descales.k.unit is ScaleUnit.BLOCK
    with pytest.raises(fa.DescaleError, match=r"k_descale: got shape \(3, 2, 9\).*\(3, 2, 3\) for blocks"):
        request(k_descale=scale(B, HKV, 9))


REFUSED = {
    "one dimension": (fa.DescaleError, r"k_descale: got shape \(2,\), which may be", lambda: request(k_descale=scale(HKV))),
    "one number": (fa.DescaleError, r"k_descale: got shape \(1,\).*call .reshape\(\(\)\)", lambda: request(k_descale=scale(1))),
    "wrong shape": (
        fa.DescaleError,
        r"v_descale: got shape \(2, 3\); allowed are \(\).*\(3, 2\)",
        lambda: request(v_descale=scale(HKV, B)),
    ),
    "query heads": (fa.DescaleError, r"q_descale: got shape \(3, 4\)", lambda: request(q_descale=scale(B, HQ))),
    "slots without pages": (fa.DescaleError, r"k_descale: got shape \(3, 300, 2\)", lambda: request(k_descale=scale(B, S, HKV))),
    "q by slots": (fa.DescaleError, "q_descale: got an array with bfloat16 in q", lambda: paged(q_descale=scale(5, 16, HKV))),
    "two readings": (
        fa.DescaleError,
        "fits blocks of tokens and slots",
        lambda: paged(blocks=B, block_size=HKV, k_descale=scale(B, HKV, 2)),
    ),
    "type": (fa.DescaleError, "k_descale: got type float64", lambda: request(k_descale=np.ones((B, HKV)))),
    "16-bit q": (fa.DescaleError, "q_descale: got an array with float16 in q", lambda: request(np.float16, q_descale=scale())),
    "16 bits": (
        fa.DescaleError,
        "k_descale, v_descale: got descales with float16 in k",
        lambda: request(*[np.float16] * 3, k_descale=scale(), v_descale=scale()),
    ),
    "options beside 16 bits": (
        fa.DescaleError,
        "fp8: got Fp8Options with float16 in k",
        lambda: request(*[np.float16] * 3, out_dtype=DType.F32),
    ),
    "no options": (fa.ArrayTypeError, "fp8: got ndarray", lambda: replace(request(), fp8=scale())),
    "out_dtype": (fa.DTypeError, "out_dtype: got <DType.F64", lambda: Fp8Options(out_dtype=DType.F64)),
    "only v": (fa.DTypeError, "v: got type float8_e4m3fn with bfloat16 in q.*; convert k$", lambda: request(*[ml_dtypes.bfloat16] * 2)),
    "only q": (
        fa.DTypeError,
        "k: got type bfloat16 with float8_e4m3fn in q.*; convert q$",
        lambda: request(E4M3, *[ml_dtypes.bfloat16] * 2),
    ),
    "wide q": (fa.DTypeError, "k: got type float8_e4m3fn with float32 in q.*; convert q$", lambda: request(np.float32)),
    "a pair": (
        fa.ArrayTypeError,
        "; pass its values and its descale, each as",
        lambda: replace(request(), k=fa.quantize(np.ones((B, S, HKV, D)))),
    ),
    "a number": (fa.ArrayTypeError, "v_descale: got builtins.float.*; call numpy.asarray$", lambda: request(v_descale=0.5)),
    "bytes": (fa.DTypeError, "q: got type uint8", lambda: request(*[np.uint8] * 3)),
    "head dim": (fa.HeadDimError, "q: got head dim 24 with fp8; allowed are multiples of 16.*softmax_scale", lambda: request(head_dim=24)),
    "dropout": (fa.DropoutError, "with fp8 k and v", lambda: replace(request(), options=fa.AttentionOptions(dropout_p=0.5))),
    "out": (fa.OutputError, "allowed is float32", lambda: replace(request(out_dtype=DType.F32), out=np.zeros((B, S, HQ, D), E4M3))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_nothing_is_refused(name: str):
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_a_backward_is_refused_by_name():
    q = np.zeros((1, 2, 2, 16), E4M3)
    out = np.zeros((1, 2, 2, 16), ml_dtypes.bfloat16)
    with pytest.raises(fa.FeatureNotBuiltError, match="'fp8_backward' is not built"):
        fa.DenseBwdRequest(q, q, q, dout=out, recompute=True)


@pytest.mark.parametrize("wants", ["q", "k", "v"])
def test_a_gradient_is_refused_by_name(wants: str):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.zeros((1, 2, 2, 16), dtype=torch.bfloat16 if name == wants else torch.float8_e4m3fn) for name in "qkv"}
    tensors[wants].requires_grad_()
    with pytest.raises(fa.FeatureNotBuiltError, match=f"'fp8_backward' is not built.*{wants} requires grad"):
        fa.DenseFwdRequest(**tensors)


@pytest.mark.parametrize("name", ["k", "v"])
def test_batch_invariant_rows_have_no_descales_of_v_by_slots_on_a_gpu(name: str):
    extras = fa.Extras(batch_invariant=True, **{f"{name}_descale": ScaleUnit.TOKEN})
    keys = [fa.DispatchKey(arch, DType.F8E4M3, 64, paged=True, extras=extras) for arch in (SmArch.CPU, SmArch.SM_89, SmArch.SM_90)]
    assert fa.lookup(keys[0]).kernel_name == "reference_cpu"
    for key in keys[1:]:
        if name == "k":
            assert fa.lookup(key).batch_invariant
            continue
        with pytest.raises(fa.FeatureNotBuiltError, match="'invariant_token_scales' is not built"):
            fa.lookup(key)


PLAIN = fa.DispatchKey(SmArch.CPU, DType.F8E4M3, 64)
CONTRADICTIONS = {
    "q descale": (
        "q_descale: got one with f16 in q",
        {"q_descale": ScaleUnit.HEAD, "k_dtype": DType.F8E4M3, "v_dtype": DType.F8E4M3},
        DType.F16,
    ),
    "v descale": ("v_descale: got one with bf16 in v", {"v_descale": ScaleUnit.TENSOR}, DType.BF16),
    "only k": ("dtype: got f16, e4m3, f16, f16 in q, k, v and o", {"k_dtype": DType.F8E4M3}, DType.F16),
    "wide q": ("dtype: got f32, e4m3, e4m3", {"k_dtype": DType.F8E4M3, "v_dtype": DType.F8E4M3}, DType.F32),
    "fp8 in o": ("dtype: got e4m3, e4m3, e4m3, e5m2", {"out_dtype": DType.F8E5M2}, DType.F8E4M3),
    "dropout": ("dropout: got dropout with fp8", {"dropout": True}, DType.F8E4M3),
    "v head dim": ("head_dim: got 64 and 24 with fp8", {"v_head_dim": 24}, DType.F8E4M3),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keys_that_contradict_themselves_have_no_kernel(name: str):
    message, extras, dtype = CONTRADICTIONS[name]
    with pytest.raises(fa.DispatchError, match=re.escape(message)):
        fa.lookup(replace(PLAIN, dtype=dtype, extras=fa.Extras(**extras)))


@pytest.mark.parametrize("extras", [{}, {"out_dtype": DType.F32}, {"k_dtype": DType.F8E5M2}, {"v_descale": ScaleUnit.BLOCK}], ids=str)
def test_the_cpu_has_them_all(extras: dict[str, Any]):
    assert fa.lookup(replace(PLAIN, extras=fa.Extras(**extras))).kernel_name == "reference_cpu"


def test_an_fp8_request_of_fa3_has_fp8_keys_and_values():
    q, k = np.zeros((B, S, HQ, D), np.float16), np.zeros((B, S, HKV, D), E5M2)
    made = fa.Fa3FwdFp8Request(q, k, k, fp8=Fp8Options(k_descale=scale()))
    key = made.dispatch_key(SmArch.SM_90A)
    assert (key.family, key.dtype, key.k_dtype) == (Family.FA2, DType.F16, DType.F8E5M2), "wgmma takes fp8 in q alone"
    assert fa.run(made).out.dtype == np.float16
    with pytest.raises(fa.DTypeError, match="k, v: got types float16 and float16"):
        fa.Fa3FwdFp8Request(q, q, q)


@pytest.mark.parametrize("q", [E4M3, np.float16])
@pytest.mark.parametrize("arch", GPU_ARCHS, ids=lambda arch: arch.value)
def test_plain_arrays_are_for_wgmma_where_it_takes_them_and_else_for_mma_sync(arch: SmArch, q: Any):
    """Whatever family is asked for: a q of 16 bits beside fp8 K and V has one."""
    key = key_of_problem(request(q).problem, arch)
    if arch in {SmArch.SM_80, SmArch.SM_86}:
        with pytest.raises(fa.ArchUnsupportedError, match="which has no fp8; allowed are sm_89"):
            fa.lookup(key)
        return
    wgmma, types = arch is SmArch.SM_90A and q is E4M3, "e4m3_obf16" if q is E4M3 else "f16_ke4m3_ve4m3"
    name = fa.lookup(key).kernel_name
    assert name.startswith(
        f"fa3_fp8_sm90a_{types}_d64_" if wgmma else f"fp8_kvcache_{arch.without_wgmma.value.replace('_', '')}_{types}_d32_"
    )
    products = "_fp8products" if q is E4M3 and arch in {SmArch.SM_89, SmArch.SM_120} else ""
    assert wgmma or name.endswith(f"m128n32w8s2b1_plainkv{products}"), "the rows of a KV head are more than 64"
    assert fa.lookup(key_of_problem(request(q).problem, arch, family=Family.FA2)).family is Family.FA2
    if arch is not SmArch.SM_89:
        asked = fa.lookup(key_of_problem(request(q).problem, arch, family=Family.FA3))
        assert asked.family is (Family.FA3 if wgmma else Family.FA2)


@pytest.mark.parametrize("way", [{}, {"kv_cache": True}, {"kv_cache": True, "scheduled": True}, {"batch_invariant": True}], ids=str)
def test_q_and_k_are_multiplied_in_8_bits_where_mma_sync_has_such_products(way: dict[str, Any]):
    extras = fa.Extras(family=Family.FA2, k_dtype=DType.F8E5M2, v_dtype=DType.F8E4M3, out_dtype=DType.BF16, **way)
    for arch, dtype in product(SmArch, (DType.F8E4M3, DType.BF16)):
        if arch not in {SmArch.CPU, SmArch.SM_80, SmArch.SM_86}:
            spec: Any = fa.lookup(fa.DispatchKey(arch, dtype, 64, extras=extras))
            assert spec.fp8_products is (dtype.is_fp8 and arch in {SmArch.SM_89, SmArch.SM_120})
            assert ("QMMA" in spec.expected_instructions) is spec.fp8_products
    if not extras.scheduled:
        borrowed: Any = fa.lookup(fa.DispatchKey(SmArch.SM_90, DType.F8E4M3, 64, extras=replace(extras, tiles_for=SmArch.SM_89)))
        assert borrowed.fp8_products, "tests on Hopper run them"
        assert "QMMA" not in borrowed.expected_instructions


@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
def test_plain_arrays_have_no_descales_of_tokens(name: str):
    key = fa.DispatchKey(SmArch.SM_89, DType.F8E4M3, 64, extras=fa.Extras(**{name: ScaleUnit.TOKEN}))
    with pytest.raises(fa.DispatchError, match=f"{name}: got those of tokens without pages; allowed are those of all"):
        fa.lookup(key)


@pytest.mark.parametrize("direction", ["dropout_mask", "merge_states"])
def test_fp8_is_no_type_of_patterns_and_of_outputs(direction: Any):
    with pytest.raises(fa.ArchUnsupportedError, match="dtype: got e4m3 on sm_89; allowed there are f16, bf16"):
        fa.lookup(fa.DispatchKey(SmArch.SM_89, DType.F8E4M3, 64, extras=fa.Extras(direction=direction)))


@pytest.mark.parametrize("arch", [arch for arch in GPU_ARCHS if arch not in {SmArch.SM_80, SmArch.SM_86}], ids=lambda arch: arch.value)
def test_every_tile_of_mma_sync_fits_in_shared_memory(arch: SmArch):
    """99 KB hold 128 rows of a bf16 q, and what they are scaled by."""
    types, ways = {"k_dtype": DType.F8E4M3, "v_dtype": DType.F8E5M2}, ({}, {"split": True}, {"batch_invariant": True}, {"scheduled": True})
    for dtype, width, rows, way in product((DType.BF16, DType.F16, DType.F8E4M3), HEAD_DIM_WIDTHS, (16, 32, 64, 128), ways):
        extras = fa.Extras(family=Family.FA2, cache_rows=rows, kv_cache="scheduled" in way, **types, **way)
        spec = fa.lookup(fa.DispatchKey(arch, dtype, width, extras=extras))
        assert isinstance(spec, KernelSpec)
        assert spec.shared_memory <= arch.shared_memory_per_block


def test_a_descale_that_moved_is_told_by_its_name():
    given = scale(B, HKV)
    made = request(k_descale=given)
    staleness.Fingerprint.of(made)
    given.resize((B, HKV + 1), refcheck=False)
    with pytest.raises(fa.StaleArrayError, match=r"^k_descale: its memory changed since the request was made"):
        staleness.Fingerprint.of(made)


def test_a_single_level_is_that_of_wgmma_alone():
    plain, single = (request(single_level=wanted, out_dtype=DType.F32) for wanted in (False, True))
    for arch in GPU_ARCHS:
        if arch in BEFORE_FP8:
            continue
        specs = [fa.lookup(each.dispatch_key(arch)) for each in (plain, single)]
        if arch is SmArch.SM_90A:
            assert specs[1] == replace(specs[0], single_level=True, tile=replace(specs[0].tile, ping_pong=False))
        else:
            assert specs[0] == specs[1]
    assert fa.lookup(replace(single.dispatch_key(SmArch.SM_90A), paged=True)).single_level
    by_block = [request(single_level=wanted, v_descale=scale(B, HKV, 3)).dispatch_key(SmArch.SM_90A) for wanted in (False, True)]
    assert fa.lookup(by_block[0]) == fa.lookup(by_block[1])
    assert _facts_of_fp8(plain.problem, plain.problem.descales) != _facts_of_fp8(single.problem, single.problem.descales)
    assert "single_level=True" in repr(single.fp8)


def test_a_single_level_is_a_flag_and_of_fp8():
    with pytest.raises(fa.UnsupportedArgumentError, match="single_level: got 1; allowed are True and False"):
        Fp8Options(single_level=1)
    key = fa.DispatchKey(SmArch.SM_90A, DType.BF16, 64, extras=fa.Extras(single_level=True))
    with pytest.raises(fa.DispatchError, match="single_level: got it with bf16"):
        fa.lookup(key)
