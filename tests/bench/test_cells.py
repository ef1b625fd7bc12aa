from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from atomr_accel_flashattn.bench.cache_cells import select_cache_cells
from atomr_accel_flashattn.bench.cells import Cell, all_cells, select
from atomr_accel_flashattn.types import DType


def test_the_grid_holds_its_tokens_and_its_width_in_every_cell() -> None:
    grid = [cell for cell in all_cells() if cell.group == "grid"]
    assert len(grid) == 36
    assert {cell.tokens for cell in grid} == {16384}
    assert {cell.heads * cell.head_dim for cell in grid} == {2048}


def test_the_other_cells_are_those_of_the_peer_tables_and_of_each_feature() -> None:
    names = [str(cell) for cell in all_cells() if cell.group != "grid"]
    assert names == [
        "gqa_d128_h32x8_causal_2k",
        "gqa_d128_h32x8_causal_8k",
        "gqa_d128_h32x8_causal_16x4k",
        "gqa_d128_h32x8_causal_128x4k",
        "chunk_d128_h8x1_causal_512x64k",
        "chunk_d128_h64x8_causal_512x64k",
        "varlen_d128_h16_full_32seqs",
        "varlen_d128_h16_causal_32seqs",
        "window_d128_h16_window1024_8k",
        "window_d128_h16_window1024_16k",
        "alibi_d128_h16_causal_2k",
        "alibi_d128_h16_causal_8k",
        "softcap_d128_h16_causal_2k",
        "softcap_d128_h16_causal_8k",
        "softcap_d64_h32_causal_2k",
        "softcap_d256_h8_causal_2k",
        "low_softcap_d128_h16_causal_2k",
        "sink4_d128_h16_window1024_8k",
        "sink4_d128_h16_window1024_16k",
    ]
    assert {cell.tokens for cell in all_cells() if cell.packed} == {76576}


def test_names_are_unique() -> None:
    names = [str(cell) for cell in all_cells()]
    assert len(set(names)) == len(names)


def test_flops_count_a_causal_mask_as_half_and_a_window_exactly() -> None:
    def cell(**changes: object) -> Cell:
        sizes: dict[str, object] = {"group": "x", "head_dim": 64, "heads": 2, "heads_kv": 1, "lengths": (100, 100), "causal": False}
        return Cell(**sizes | changes)

    assert cell().flops == 4 * 2 * 64 * 2 * 100 * 100
    assert cell(causal=True).flops == cell().flops / 2
    pairs = sum(min(i + 1, 30) for i in range(100))
    assert cell(causal=True, window=30).flops == 4 * 2 * 64 * 2 * pairs
    assert cell().min_bytes == 2 * 200 * 64 * (2 + 2 + 1 + 1)


@pytest.mark.parametrize(("n", "keys"), [(100, 100), (40, 100), (100, 40)])
@pytest.mark.parametrize("bounds", [(29, 0), (29, 7), (0, 0), (3, -1), (-1, 0)])
@pytest.mark.parametrize("sinks", [0, 4, 50, 1000])
def test_pairs_with_sink_tokens_are_those_that_the_semantics_show(n: int, keys: int, bounds: tuple[int, int], sinks: int) -> None:
    left, right = bounds
    cell = Cell(group="x", head_dim=64, heads=1, heads_kv=1, lengths=(n,), length_k=keys, causal=False, band=bounds, sink_tokens=sinks)
    p, j = np.arange(keys - n, keys)[:, None], np.arange(keys)[None]
    visible = (right < 0) | (j <= p + right)
    visible = visible & ((left < 0) | (j >= p - left) | (j < sinks))
    half_counted = bounds == (-1, 0) and n == keys
    assert cell.flops == 4 * 64 * (n * n / 2 if half_counted else visible.sum())


def test_a_cell_with_a_feature_has_a_plain_cell_of_its_shape() -> None:
    cells = all_cells()
    plain = {replace(cell, group="") for cell in cells if not cell.features}
    features = [cell for cell in cells if cell.features]
    assert {cell.features for cell in features} == {("ALiBi",), ("softcap",), ("sink tokens",)}
    for cell in features:
        assert replace(cell, group="", alibi=False, softcap=0.0, sink_tokens=0, score_std=1.0) in plain


def test_select_takes_patterns_and_bare_words() -> None:
    assert len(select(None)) == 55
    assert {cell.head_dim for cell in select("grid_d64*")} == {64}
    assert {cell.group for cell in select("varlen, gqa")} == {"varlen", "gqa"}


def test_cells_of_fp8_are_there_by_name_alone() -> None:
    chosen = select("fp8")
    assert len(chosen) == 18
    assert {str(cell).rpartition("_")[2] for cell in chosen} == {"e4m3"}
    assert not set(chosen) & set(select(None))
    wide = replace(chosen[0], dtype=DType.BF16)
    assert chosen[0].min_bytes * 2 < wide.min_bytes * 1.3  # o has 16 bits
    by_name = select_cache_cells("fp8")
    assert {(cell.dtype, cell.type_of_q) for cell in by_name} == {(DType.F8E4M3, DType.BF16), (DType.F8E4M3, DType.F8E4M3)}
    known = {str(cell) for cell in select_cache_cells(None)}
    assert {cell.beside for cell in by_name} <= known
    assert not known & {str(cell) for cell in by_name}


def test_select_refuses_what_matches_nothing_and_lists_the_cells() -> None:
    with pytest.raises(ValueError, match=re.escape("no benchmark cell matches 'int4'")) as refusal:
        select("int4")
    assert "grid_d64_h32_full_512" in str(refusal.value)
