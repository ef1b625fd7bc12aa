from __future__ import annotations

from dataclasses import replace

import pytest

from atomr_accel_flashattn.kernels.params import TensorMapSpec
from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.problem import AttentionProblem, Strides
from atomr_accel_flashattn.types import DType
from tests.jit.kernels import WGMMA
from tests.jit.test_params import array, dense, varlen

SPEC = replace(WGMMA, head_dim=64, v_head_dim=32, tile=Tile(block_m=128, block_n=96, warps=12, stages=2))
PACKED = replace(SPEC, pack_gqa=True)


def maps(problem: AttentionProblem) -> tuple[TensorMapSpec, TensorMapSpec, TensorMapSpec]:
    return SPEC.tensor_maps(problem)


def test_dense_with_grouped_heads():
    q, k, v = maps(dense())
    assert q == TensorMapSpec(DType.BF16, 1, (64, 300, 8, 2), (1024, 128, 307200), (64, 64, 1, 1))
    assert k == TensorMapSpec(DType.BF16, 2, (64, 500, 2, 2), (256, 128, 128000), (64, 96, 1, 1))
    assert v == TensorMapSpec(DType.BF16, 3, (32, 500, 2, 2), (128, 64, 64000), (32, 96, 1, 1))


def test_packed_tokens_are_one_batch():
    q, k, v = maps(varlen())
    assert q == TensorMapSpec(DType.BF16, 1, (64, 450, 8, 1), (1024, 128, 16), (64, 64, 1, 1))
    assert (k.sizes, k.strides) == ((64, 700, 2, 1), (256, 128, 16))
    assert (v.sizes, v.strides) == ((32, 700, 2, 1), (128, 64, 16))


@pytest.mark.parametrize(
    ("width", "columns", "row_bytes"), [(32, 32, 64), (64, 64, 128), (96, 32, 64), (128, 64, 128), (192, 64, 128), (256, 64, 128)]
)
def test_a_box_is_one_panel_of_the_tile(width: int, columns: int, row_bytes: int):
    spec = replace(SPEC, head_dim=width, v_head_dim=width)
    for made, rows in zip(spec.tensor_maps(dense()), (64, 96, 96), strict=True):
        assert made.box == (columns, rows, 1, 1)
        assert made.box[0] * made.dtype.itemsize == row_bytes


def test_a_box_of_packed_heads_holds_all_of_a_group_for_one_row_after_the_other():
    q, *others = PACKED.tensor_maps(dense())
    assert q == TensorMapSpec(DType.BF16, 1, (64, 4, 300, 2, 2), (128, 1024, 512, 307200), (64, 4, 16, 1, 1))
    assert others == [*maps(dense())[1:]], "K and V have no heads that share them"


@pytest.mark.parametrize(("heads", "heads_kv", "box"), [(2, 1, (2, 32)), (8, 1, (8, 8)), (64, 1, (64, 1))], ids=str)
def test_a_box_has_64_rows_whatever_the_number_of_heads(heads: int, heads_kv: int, box: tuple[int, int]):
    problem = dense(q=array(1, 2, 300, heads, 64), q_strides=Strides(300 * 64 * heads, 64 * heads, 64), heads=heads, heads_kv=heads_kv)
    q, *_ = PACKED.tensor_maps(problem)
    assert q.sizes == (64, heads, 300, 1, 2)
    assert q.strides == (128, 128 * heads, 128 * heads, 300 * 128 * heads)
    assert q.box == (64, *box, 1, 1)


def test_packed_heads_of_packed_tokens():
    q, *_ = PACKED.tensor_maps(varlen())
    assert (q.sizes, q.strides) == ((64, 4, 450, 2, 1), (128, 1024, 512, 16))


def test_packed_heads_may_lie_anywhere():
    heads_first, _, _ = PACKED.tensor_maps(dense(q_strides=Strides(8 * 300 * 64, 64, 300 * 64)))
    assert (heads_first.sizes, heads_first.strides) == ((64, 4, 300, 2, 2), (38400, 128, 153600, 307200))
    shared, _, _ = PACKED.tensor_maps(dense(q_strides=Strides(0, 64, 0)))
    assert shared.strides == (0, 128, 0, 0)
    narrow, _, _ = PACKED.tensor_maps(dense(q=array(1, 2, 300, 8, 40)))
    assert (narrow.sizes[0], narrow.box[0]) == (40, 64)
    one_row, _, _ = PACKED.tensor_maps(dense(q=array(1, 1, 1, 8, 64), q_strides=Strides(7, 7, 64), batch=1))
    assert (one_row.sizes, one_row.strides) == ((64, 4, 1, 2, 1), (128, 16, 512, 16))


def test_columns_past_the_head_dim_are_outside_the_tensor():
    problem = dense(q=array(1, 2, 300, 8, 40))
    q, *_ = maps(problem)
    assert (q.sizes[0], q.box[0]) == (40, 64)


@pytest.mark.parametrize("odd", [0, 1, 7, -3, 1 << 50])
def test_strides_of_dimensions_of_one_element_do_not_count(odd: int):
    problem = dense(q=array(1, 1, 1, 1, 64), q_strides=Strides(odd, odd, odd), batch=1)
    q, *_ = maps(problem)
    assert (q.sizes, q.strides) == ((64, 1, 1, 1), (16, 16, 16))
    packed = replace(varlen(), k=array(2, 700, 1, 64), k_strides=Strides(0, 64, odd))
    assert maps(packed)[1].strides == (128, 16, 16)


def test_a_broadcast_dimension_keeps_its_stride_of_zero():
    _, k, _ = maps(dense(k_strides=Strides(0, 64, 0)))
    assert (k.sizes, k.strides) == ((64, 500, 2, 2), (128, 0, 0))


def test_no_keys_make_a_map_of_one_row_somewhere():
    q, k, v = maps(dense(k=array(0, 2, 0, 2, 64), v=array(0, 2, 0, 2, 32), k_strides=Strides(0, 128, 64), v_strides=Strides(0, 64, 32)))
    assert q.ptr == 1
    assert (k.sizes, k.strides) == ((64, 1, 2, 2), (16, 128, 0))
    assert (v.sizes, v.strides) == ((32, 1, 2, 2), (16, 64, 0))
    assert k.ptr == v.ptr != 0
    assert k.ptr % 16 == 0


def test_the_longest_steps_fit():
    q, *_ = maps(dense(q_strides=Strides((1 << 31) + 8, 136, 64)))
    assert q.strides == (272, 128, (1 << 32) + 16)
