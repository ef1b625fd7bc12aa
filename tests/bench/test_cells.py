from __future__ import annotations

import re

import pytest

from atomr_accel_flashattn.bench.cells import Cell, all_cells, select


def test_the_grid_holds_its_tokens_and_its_width_in_every_cell() -> None:
    grid = [cell for cell in all_cells() if cell.group == "grid"]
    assert len(grid) == 36
    assert {cell.tokens for cell in grid} == {16384}
    assert {cell.heads * cell.head_dim for cell in grid} == {2048}


def test_the_other_cells_are_those_of_the_peer_tables() -> None:
    names = [str(cell) for cell in all_cells() if cell.group != "grid"]
    assert names == [
        "gqa_d128_h32x8_causal_2k",
        "gqa_d128_h32x8_causal_8k",
        "varlen_d128_h16_full_32seqs",
        "varlen_d128_h16_causal_32seqs",
        "window_d128_h16_window1024_8k",
        "window_d128_h16_window1024_16k",
        "alibi_d128_h16_causal_2k",
        "alibi_d128_h16_causal_8k",
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


def test_select_takes_patterns_and_bare_words() -> None:
    assert len(select(None)) == 44
    assert {cell.head_dim for cell in select("grid_d64*")} == {64}
    assert {cell.group for cell in select("varlen, gqa")} == {"varlen", "gqa"}


def test_select_refuses_what_matches_nothing_and_lists_the_cells() -> None:
    with pytest.raises(ValueError, match=re.escape("no benchmark cell matches 'fp8'")) as refusal:
        select("fp8")
    assert "grid_d64_h32_full_512" in str(refusal.value)
