from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from atomr_accel_flashattn.problem import Band
from atomr_accel_flashattn.reference.mask import BandMask

_bound = st.none() | st.integers(0, 30)


def visible(mask: BandMask) -> np.ndarray:
    """docs/semantics.md, "Which keys a query sees", one element at a time."""
    left, right, sinks = mask.band
    shift = mask.seqlen_k - mask.seqlen_q
    table = np.zeros((mask.seqlen_q, mask.seqlen_k), bool)
    for i in range(mask.seqlen_q):
        for j in range(mask.seqlen_k):
            table[i, j] = (right is None or j <= i + shift + right) and (left is None or j >= i + shift - left or j < sinks)
    return table


masks = st.builds(
    lambda q, k, left, right, sinks: BandMask(q, k, Band(left, right, sinks if left is not None else 0)),
    st.integers(1, 30),
    st.integers(1, 30),
    _bound,
    _bound,
    st.integers(0, 40),
)


@given(masks, st.data())
def test_ranges_hold_exactly_the_keys_that_some_query_sees(mask: BandMask, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, mask.seqlen_q - 1))
    rows = range(start, data.draw(st.integers(start + 1, mask.seqlen_q)))
    listed = [key for keys in mask.key_ranges(rows) for key in keys]
    assert listed == np.flatnonzero(visible(mask)[rows.start : rows.stop].any(axis=0)).tolist()


@given(masks, st.data())
def test_hidden_is_the_complement_of_visible_and_none_when_nothing_is_hidden(mask: BandMask, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, mask.seqlen_q - 1)), data.draw(st.integers(0, mask.seqlen_k - 1))
    rows, cols = range(i, data.draw(st.integers(i + 1, mask.seqlen_q))), range(j, data.draw(st.integers(j + 1, mask.seqlen_k)))
    expected = ~visible(mask)[rows.start : rows.stop, cols.start : cols.stop]
    hidden = mask.hidden(rows, cols)
    np.testing.assert_array_equal(np.zeros_like(expected) if hidden is None else hidden, expected)


def test_tiles_inside_the_band_skip_the_element_test() -> None:
    assert BandMask(512, 512, Band(None, 0)).hidden(range(256, 512), range(256)) is None
    assert BandMask(512, 512, Band(400, 0)).hidden(range(256, 300), range(200)) is None
    assert BandMask(512, 512, Band(10, 0, 64)).hidden(range(256, 300), range(64)) is None
