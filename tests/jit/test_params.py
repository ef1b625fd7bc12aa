from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from atomr_accel_flashattn.jit import nvrtc
from atomr_accel_flashattn.jit.headers import headers_dir
from atomr_accel_flashattn.kernels.backward import BwdParams
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskParams
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8FwdParams
from atomr_accel_flashattn.kernels.fa3_fp8_kvcache import Fa3Fp8KvCacheParams
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3FwdParams
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheParams
from atomr_accel_flashattn.kernels.forward import DESCALE_SLOTS, ForwardSpec, FwdParams
from atomr_accel_flashattn.kernels.fp8_kvcache import DescaledKvCacheParams, DescaledStepParams
from atomr_accel_flashattn.kernels.kv_append import Fp8AppendParams, KvAppendParams
from atomr_accel_flashattn.kernels.kvcache import KvCacheParams
from atomr_accel_flashattn.kernels.merge_states import MergeStatesParams
from atomr_accel_flashattn.kernels.params import KernelParams, StrideParams, TensorMapParams
from atomr_accel_flashattn.kernels.spec import KernelSpec, Tile
from atomr_accel_flashattn.kernels.step import StepParams
from atomr_accel_flashattn.limits import UNBOUNDED
from atomr_accel_flashattn.problem import ArrayInfo, AttentionProblem, Band, Descale, Descales, Dropout, Strides
from atomr_accel_flashattn.runtime.plan import SLOTS, Outputs, addresses_of, slots_of
from atomr_accel_flashattn.types import Device, DType, ScaleUnit
from tests.jit.kernels import FORWARD, MASK, WGMMA

SPEC = replace(FORWARD, tile=Tile(block_m=128, block_n=64, warps=4))
PACKED = replace(WGMMA, pack_gqa=True, tile=Tile(block_m=128, block_n=64, warps=12, stages=2))
_STRUCTS = {
    StrideParams: "fa::Strides",
    FwdParams: "fa::FwdParams",
    TensorMapParams: "fa::TensorMap",
    Fa3FwdParams: "fa::Fa3FwdParams",
    Fa3Fp8FwdParams: "fa::Fa3Fp8FwdParams",
    BwdParams: "fa::BwdParams",
    KvCacheParams: "fa::KvCacheParams",
    StepParams: "fa::StepParams",
    DescaledKvCacheParams: "fa::DescaledKvCacheParams",
    DescaledStepParams: "fa::DescaledStepParams",
    KvAppendParams: "fa::KvAppendParams",
    Fp8AppendParams: "fa::Fp8AppendParams",
    DropoutMaskParams: "fa::DropoutMaskParams",
    MergeStatesParams: "fa::MergeStatesParams",
}
_KERNELS = [FwdParams, Fa3FwdParams, DropoutMaskParams]
_PADDING = {"_alignment"}  # which the kernels' compiler puts there by itself


def array(ptr: int, *shape: int, dtype: DType | None = DType.BF16) -> ArrayInfo:
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return ArrayInfo(ptr, shape, strides, dtype, dtype.value if dtype else "int", Device("cuda", 0), None)


def dense(**changes: Any) -> AttentionProblem:
    """B 2, Sq 300, Sk 500, Hq 8, Hkv 2, D 64, Dv 32; addresses 1, 2, 3."""
    problem = AttentionProblem(
        q=array(1, 2, 300, 8, 64),
        k=array(2, 2, 500, 2, 64),
        v=array(3, 2, 500, 2, 32),
        q_strides=Strides(300 * 512, 512, 64),
        k_strides=Strides(500 * 128, 128, 64),
        v_strides=Strides(500 * 64, 64, 32),
        batch=2,
        heads=8,
        heads_kv=2,
        seqlen_q=300,
        seqlen_k=500,
        head_dim=64,
        v_head_dim=32,
        softmax_scale=0.125,
    )
    return replace(problem, **changes)


def varlen(**changes: Any) -> AttentionProblem:
    """The same sizes packed: total_q 450, total_k 700."""
    return dense(
        q=array(1, 450, 8, 64),
        k=array(2, 700, 2, 64),
        v=array(3, 700, 2, 32),
        q_strides=Strides(0, 512, 64),
        k_strides=Strides(0, 128, 64),
        v_strides=Strides(0, 64, 32),
        cu_seqlens_q=array(6, 3, dtype=None),
        cu_seqlens_k=array(7, 3, dtype=None),
        **changes,
    )


def pack(problem: AttentionProblem, spec: ForwardSpec = SPEC) -> FwdParams:
    made: Any = spec.pack(problem, array(4, *problem.out_shape))
    return made if isinstance(made, FwdParams) else made.fwd


def outputs(problem: AttentionProblem, *, lse: bool = True, keep: bool = False) -> Outputs:
    return Outputs(
        array(4, *problem.out_shape),
        array(5, *problem.lse_shape, dtype=DType.F32) if lse else None,
        array(11, *problem.dropout_mask_shape, dtype=None) if keep else None,
    )


def strides(value: StrideParams) -> tuple[int, int, int]:
    return value.batch, value.row, value.head


@pytest.mark.parametrize("struct", _STRUCTS, ids=lambda struct: struct.__name__)
def test_structs_lie_in_memory_as_the_kernels_see_them(struct: type[ctypes.Structure]):
    name = _STRUCTS[struct]
    fields = [field[0] for field in struct._fields_ if field[0] not in _PADDING]
    lines = [f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});"]
    lines += [f'static_assert(sizeof({name}::{field}) == {getattr(struct, field).size}, "size of {field}");' for field in fields]
    # Same sizes, same order, same whole: same offsets. NVRTC 13.0 has no offsetof, but it compares addresses inside an object.
    lines.append(f"constexpr bool before(const void* a, const void* b) {{ return a < b; }}\nconstexpr {name} value{{}};")
    for first, second in itertools.pairwise(fields):
        lines.append(f'static_assert(before(&value.{first}, &value.{second}), "{first} is not before {second}");')
    # A structured binding names every member: one that only the kernels know would not compile, even inside padding.
    names = ", ".join(f"m{index}" for index in range(len(fields)))
    lines.append(f'extern "C" __global__ void k(const __grid_constant__ {name} p) {{ const auto& [{names}] = p; }}')
    text = '#include "attention/params.cuh"\n' + "\n".join(lines)
    nvrtc.compile_source("layout", text, "sm_80", [headers_dir()])


def test_parameters_of_wgmma_over_an_fp8_cache_lie_in_memory_as_the_kernel_sees_them():
    whole, fields = ctypes.sizeof(Fa3Fp8KvCacheParams), [name for name, _ in Fa3Fp8KvCacheParams._fields_ if name not in _PADDING]
    # The struct in C++ with its bases spelled out as members: the same sizes and the same whole mean the same offsets.
    lines = [
        "using namespace fa;",
        "struct Spelled { const float *q_descale, *k_descale, *v_descale; KvCacheParams params;",
        "Strides q_descale_stride, k_descale_stride, v_descale_stride;",
        "int32_t* counters; int32_t tiles, box_rows; TensorMap q_map, k_map, v_map; };",
        f"static_assert(sizeof(Fa3Fp8KvCacheParams) == {whole} && sizeof(Spelled) == {whole} && alignof(Fa3Fp8KvCacheParams) == 64);",
        "constexpr Spelled value{};",
        *(f"static_assert(sizeof(value.{name}) == {getattr(Fa3Fp8KvCacheParams, name).size});" for name in fields),
        'extern "C" __global__ void k() {}',
    ]
    nvrtc.compile_source("layout", '#include "attention/params.cuh"\n' + "\n".join(lines), "sm_80", [headers_dir()])
    assert Fa3Fp8KvCacheParams.params.offset == 24
    assert all(getattr(Fa3Fp8KvCacheParams, name).offset % 64 == 0 for name, _ in Fa3Fp8KvCacheParams.MAPS)
    first = Fa3Fp8KvCacheParams.SLOTS.index("q")
    assert [slot for _, slot in Fa3Fp8KvCacheParams.MAPS] == list(Fa3Fp8KvCacheParams.SLOTS[first : first + 3])


def test_parameters_of_wgmma_over_a_cache_begin_with_those_of_every_kernel_over_one():
    base, whole = ctypes.sizeof(KvCacheParams), ctypes.sizeof(Fa3KvCacheParams)
    assert issubclass(Fa3KvCacheParams, KvCacheParams)
    fields = [name for name, _ in Fa3KvCacheParams._fields_ if name not in _PADDING]
    assert fields == ["counters", "tiles", "box_rows", "q_map", "k_map", "v_map"]
    # The struct in C++ with the base spelled out as a member: the same sizes and the same whole mean the same offsets.
    lines = [
        "using namespace fa;",
        "struct Spelled { KvCacheParams base; int32_t* counters; int32_t tiles, box_rows; TensorMap q_map, k_map, v_map; };",
        f"static_assert(sizeof(fa::KvCacheParams) == {base} && sizeof(fa::Fa3KvCacheParams) == {whole} && sizeof(Spelled) == {whole});",
        "constexpr bool before(const void* a, const void* b) { return a < b; }\nconstexpr fa::Fa3KvCacheParams value{};",
        "static_assert(alignof(fa::Fa3KvCacheParams) == 64);",
    ]
    lines += [f"static_assert(before(&value.{first}, &value.{second}));" for first, second in itertools.pairwise(fields)]
    lines += [f"static_assert(sizeof(value.{name}) == {getattr(Fa3KvCacheParams, name).size});" for name in fields]
    text = '#include "attention/params.cuh"\n' + "\n".join(lines) + '\nextern "C" __global__ void k() {}'
    nvrtc.compile_source("cache_layout", text, "sm_90a", [headers_dir()])
    assert Fa3KvCacheParams.counters.offset == base
    assert all(getattr(Fa3KvCacheParams, name).offset % 64 == 0 for name, _ in Fa3KvCacheParams.MAPS)
    first = Fa3KvCacheParams.SLOTS.index("q")
    assert [slot for _, slot in Fa3KvCacheParams.MAPS] == list(Fa3KvCacheParams.SLOTS[first : first + 3])


def test_maps_start_on_multiples_of_64_behind_padding_that_fills_the_gap():
    fields = dict(Fa3FwdParams._fields_)
    gap, before = Fa3FwdParams._alignment, Fa3FwdParams.tiles
    assert gap.offset == before.offset + before.size
    assert gap.offset + gap.size == Fa3FwdParams.q_map.offset
    assert ctypes.sizeof(fields["_alignment"]) < 64
    for field in (Fa3FwdParams.q_map, Fa3FwdParams.k_map, Fa3FwdParams.v_map):
        assert field.offset % 64 == 0
        assert field.size == 128
    text = (
        '#include "attention/params.cuh"\nstatic_assert(alignof(fa::TensorMap) == 64 && alignof(fa::Fa3FwdParams) == 64);\n'
        'extern "C" __global__ void k() {}'
    )
    nvrtc.compile_source("alignment", text, "sm_90a", [headers_dir()])


@pytest.mark.parametrize("persistent", [False, True])
def test_the_parameters_of_the_fa3_family(persistent: bool):
    spec = replace(WGMMA, tile=replace(WGMMA.tile, persistent=persistent))
    p = spec.pack(dense(), array(4, *dense().out_shape))
    assert bytes(p.fwd) == bytes(spec.pack_forward(dense(), array(4, *dense().out_shape)))
    assert (p.counters, p.tiles) == (None, spec.work_tiles(dense()))
    assert p.tensor_maps == spec.tensor_maps(dense())
    assert [each.ptr for each in p.tensor_maps] == [1, 2, 3]
    assert p.counts == persistent, "only persistent blocks count"
    assert not any(bytes(getattr(p, name).bytes).strip(b"\0") for name, _ in p.MAPS), "a launch encodes them"


@pytest.mark.parametrize("struct", _KERNELS, ids=lambda struct: struct.__name__)
def test_addresses_come_first_in_the_order_of_their_names(struct: type[KernelParams]):
    made = struct()
    (ctypes.c_uint64 * len(struct.SLOTS)).from_buffer(made)[:] = range(1, len(struct.SLOTS) + 1)
    inner = made.fwd if isinstance(made, Fa3FwdParams) else made
    assert [getattr(inner, name) for name in struct.SLOTS] == list(range(1, len(struct.SLOTS) + 1))
    addresses = {name for name, kind in inner._fields_ if kind is ctypes.c_void_p}
    assert addresses == set(struct.SLOTS)


def test_the_addresses_of_a_backward_run_on_into_those_of_the_forward():
    made = BwdParams()
    (ctypes.c_uint64 * len(BwdParams.SLOTS)).from_buffer(made)[:] = range(1, len(BwdParams.SLOTS) + 1)
    own = len(BwdParams.SLOTS) - len(FwdParams.SLOTS)
    assert [getattr(made, name) for name in BwdParams.SLOTS[:own]] == list(range(1, own + 1))
    assert [getattr(made.fwd, name) for name in FwdParams.SLOTS] == list(range(own + 1, len(BwdParams.SLOTS) + 1))
    assert {name for name, kind in made._fields_ if kind is ctypes.c_void_p} == set(BwdParams.SLOTS[:own])


@pytest.mark.parametrize("struct", _KERNELS, ids=lambda struct: struct.__name__)
def test_arrays_that_are_read_through_maps_lead_the_others(struct: type[KernelParams]):
    assert [slot for _, slot in struct.MAPS] == list(struct.SLOTS[: len(struct.MAPS)])


@pytest.mark.parametrize("spec", [SPEC, PACKED, MASK], ids=lambda spec: spec.kernel_name)
def test_what_is_packed_has_no_addresses(spec: KernelSpec):
    problem = dense(dropout=Dropout(0.25, array(10, 2, dtype=None)), alibi_slopes=array(8, 8, dtype=DType.F32))
    made = spec.pack(problem, array(4, *problem.out_shape))
    assert not any((ctypes.c_uint64 * len(made.SLOTS)).from_buffer_copy(made))


def test_every_kernel_finds_its_addresses_among_those_of_a_call():
    problem = dense(dropout=Dropout(0.25, array(10, 2, dtype=None)))
    assert slots_of(problem, outputs(problem)) == SLOTS == FwdParams.SLOTS
    slots = slots_of(problem, outputs(problem, keep=True))
    assert all(set(struct.SLOTS) <= set(slots) for struct in _KERNELS)
    assert dict(zip(slots, addresses_of(problem, outputs(problem, keep=True)), strict=True))["keep"] == 11


def test_addresses_of_factors_follow_those_of_every_call():
    problem = dense(descales=Descales(k=Descale(array(12, dtype=DType.F32), ScaleUnit.TENSOR, Strides(0, 0, 0))))
    slots, addresses = slots_of(problem, outputs(problem)), addresses_of(problem, outputs(problem))
    assert slots == (*SLOTS, *DESCALE_SLOTS), "benchmarks put o where SLOTS has it"
    assert set(Fa3Fp8FwdParams.SLOTS) == set(slots)
    at = dict(zip(slots, addresses, strict=True))
    assert [at[name] for name in ("q", "k", "v", *DESCALE_SLOTS)] == [1, 2, 3, 0, 12, 0]


def test_unbounded_is_the_kernels_constant():
    text = f'#include "attention/params.cuh"\nstatic_assert(fa::kUnbounded == {UNBOUNDED});\nextern "C" __global__ void k() {{}}'
    nvrtc.compile_source("constants", text, "sm_80", [headers_dir()])


def test_dense():
    p = pack(dense())
    assert strides(p.q_stride) == (300 * 512, 512, 64)
    assert strides(p.k_stride) == (500 * 128, 128, 64)
    assert strides(p.v_stride) == (500 * 64, 64, 32)
    assert strides(p.o_stride) == (300 * 256, 256, 32)
    assert (p.lse_batch_stride, p.lse_head_stride) == (8 * 300, 300)
    assert (p.batch, p.heads, p.heads_per_kv, p.seqlen_q, p.seqlen_k, p.head_dim, p.v_head_dim) == (2, 8, 4, 300, 500, 64, 32)
    assert (p.window_left, p.window_right, p.sink_tokens) == (1 << 30, 1 << 30, 0)
    assert (p.blocks_m, p.work_heads, p.packed_shift) == (3, 8, 0)
    assert p.scale_log2 == pytest.approx(0.125 * math.log2(math.e))
    assert (p.dropout_threshold, p.dropout_rescale) == (256, 1.0)
    assert SPEC.work_tiles(dense()) == 3 * 2 * 8


def test_varlen():
    p = pack(varlen())
    assert strides(p.q_stride) == (0, 512, 64)
    assert strides(p.o_stride) == (0, 256, 32)
    assert (p.lse_batch_stride, p.lse_head_stride) == (0, 450)


def test_what_a_call_does_not_have_is_a_null_pointer():
    assert addresses_of(dense(), outputs(dense())) == (1, 2, 3, 4, 5, 0, 0, 0, 0, 0)
    assert addresses_of(dense(), outputs(dense(), lse=False)) == (1, 2, 3, 4, 0, 0, 0, 0, 0, 0)


def test_band():
    p = pack(dense(band=Band(left=7, right=0, sink_tokens=4)))
    assert (p.window_left, p.window_right, p.sink_tokens) == (7, 0, 4)
    huge = pack(dense(band=Band(left=1 << 40, right=1 << 40, sink_tokens=1 << 40)))
    assert (huge.window_left, huge.window_right, huge.sink_tokens) == (1 << 30,) * 3


def test_score_terms():
    p = pack(dense(softcap=30.0, alibi_slopes=array(8, 8, dtype=DType.F32), learned_sink=array(9, 8, dtype=DType.F32)))
    assert p.softcap_scale == pytest.approx(0.125 / 30)
    assert p.softcap_log2 == pytest.approx(30 * math.log2(math.e))
    assert p.alibi_batch_stride == 0
    assert pack(dense(alibi_slopes=array(8, 2, 8, dtype=DType.F32))).alibi_batch_stride == 8


def test_softcap_series():
    p = pack(dense(softcap=30.0))
    s = p.softcap_limit
    assert 0.125 * s == pytest.approx(0.4 * 30)
    for share in (1e-3, 0.2, 0.7, 1.0):
        x = share * s
        capped = 30 * math.log2(math.e) * math.tanh(0.125 * x / 30)
        assert x * (p.scale_log2 + p.softcap_cubic * x**2 + p.softcap_quintic * x**4) == pytest.approx(capped, rel=1e-5)


def test_the_error_of_the_softcap_series_is_bounded_in_log2_units():
    assert pack(dense(softcap=1e3)).softcap_limit * 0.125 * math.log2(math.e) == pytest.approx(48)


@pytest.mark.parametrize("cap", [1e-320, 1e-30, 1e300])
def test_no_softcap_series_where_its_factors_are_none_of_float32(cap: float):
    assert pack(dense(softcap=cap)).softcap_limit < 0


def test_dropout():
    problem = dense(dropout=Dropout(0.25, array(10, 2, dtype=None)))
    p = pack(problem)
    assert p.dropout_threshold == 192
    assert p.dropout_rescale == pytest.approx(4 / 3)
    mask = MASK.pack(problem, array(4, *problem.out_shape))
    assert (mask.batch, mask.heads, mask.seqlen_q, mask.seqlen_k, mask.dropout_threshold) == (2, 8, 300, 500, 192)
    assert MASK.work_tiles(problem) == 5 * 16 * 2 * 8
    assert MASK.grid(7, 3) == 7
    with pytest.raises(ValueError, match="without dropout"):
        MASK.pack(dense(), array(4, *dense().out_shape))


def test_addresses_are_those_of_the_arrays_of_a_call():
    problem = varlen(
        dropout=Dropout(0.5, array(10, 2, dtype=None)),
        alibi_slopes=array(8, 8, dtype=DType.F32),
        learned_sink=array(9, 8, dtype=DType.F32),
    )
    assert addresses_of(problem, outputs(problem)) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert addresses_of(problem, outputs(problem, keep=True)) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, 16, id="never more than there are"),
        pytest.param({"batch": 64}, 64, id="16 heads of K and V"),
        pytest.param({"batch": 64, "seqlen_k": 1 << 16}, 8, id="what fits in L2"),
        pytest.param({"batch": 64, "seqlen_k": 1 << 24}, 4, id="one group at least"),
        pytest.param({"batch": 64, "seqlen_k": 0}, 64, id="no keys"),
    ],
)
def test_where_later_rows_see_more_keys_sections_hold_whole_groups_of_heads_that_fit_in_l2(changes: dict[str, int], expected: int):
    for right in (0, 3):
        assert pack(dense(band=Band(right=right), **changes)).section_heads == expected


@pytest.mark.parametrize(
    "band", [Band(), Band(left=7, right=0), Band(left=7, right=9), Band(left=7), Band(left=7, right=0, sink_tokens=4)], ids=str
)
def test_where_all_rows_see_equally_many_keys_a_section_is_one_group(band: Band):
    assert pack(dense(band=band, batch=64)).section_heads == 4
    assert pack(dense(band=band, batch=64, heads_kv=8)).section_heads == 1
    assert pack(varlen(band=band)).section_heads == 4


@pytest.mark.parametrize(
    ("heads", "heads_kv", "blocks_m", "shift"),
    [
        pytest.param(8, 4, 5, 1, id="ratio 2"),
        pytest.param(8, 2, 10, 2, id="ratio 4"),
        pytest.param(64, 1, 150, 6, id="ratio 64"),
    ],
)
@pytest.mark.parametrize("problem", [dense, varlen], ids=lambda problem: problem.__name__)
def test_tiles_of_packed_heads_are_made_for_heads_of_k_and_v(problem: Any, heads: int, heads_kv: int, blocks_m: int, shift: int):
    asked = problem(heads=heads, heads_kv=heads_kv)
    p = pack(asked, spec=PACKED)
    assert (p.blocks_m, p.work_heads, p.packed_shift) == (blocks_m, heads_kv, shift)
    assert (p.heads, p.heads_per_kv, p.seqlen_q) == (heads, heads // heads_kv, 300), "what is asked does not change"
    assert PACKED.work_tiles(asked) == blocks_m * 2 * heads_kv
    assert strides(p.q_stride) == strides(pack(asked).q_stride)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, 4, id="never more than there are"),
        pytest.param({"batch": 64}, 16, id="16 heads of K and V"),
        pytest.param({"batch": 64, "seqlen_k": 1 << 16}, 2, id="what fits in L2"),
        pytest.param({"batch": 64, "seqlen_k": 1 << 24}, 1, id="one at least"),
        pytest.param({"batch": 64, "band": Band(left=7, right=0)}, 1, id="one where all rows see equally many keys"),
    ],
)
def test_sections_count_heads_of_k_and_v_where_their_query_heads_are_packed(changes: dict[str, Any], expected: int):
    assert pack(dense(**{"band": Band(right=0), **changes}), spec=PACKED).section_heads == expected


def test_empty_problems_have_no_tiles():
    for spec in (SPEC, PACKED):
        assert spec.work_tiles(dense(batch=0)) == 0
        assert spec.work_tiles(dense(seqlen_q=0)) == 0
        assert spec.work_tiles(dense(seqlen_k=0)) > 0, "rows without keys are written"
    for changes in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        assert MASK.work_tiles(dense(**changes)) == 0


@pytest.mark.parametrize(
    ("spec", "grids"),
    [
        pytest.param(SPEC, (5, 90, 90), id="fa2"),
        pytest.param(
            replace(SPEC, tile=replace(SPEC.tile, persistent=True, min_blocks=2)), (5, 40, 7), id="fa2 persistent, two blocks an SM"
        ),
        pytest.param(replace(WGMMA, tile=replace(WGMMA.tile, persistent=False)), (5, 90, 90), id="fa3"),
        pytest.param(WGMMA, (5, 20, 7), id="fa3 persistent"),
        pytest.param(MASK, (5, 90, 90), id="dropout mask"),
    ],
)
def test_grids_on_a_card_of_20_multiprocessors(spec: KernelSpec, grids: tuple[int, int, int]):
    assert (spec.grid(5, 20), spec.grid(90, 20), spec.grid(90, 20, 7)) == grids
