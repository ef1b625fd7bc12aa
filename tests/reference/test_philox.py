from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from atomr_accel_flashattn.problem import Dropout
from atomr_accel_flashattn.reference.philox import keep_mask, key_words, philox4x32
from tests.cases import Case, build
from tests.oracle import keep_pattern, keep_threshold

# The known-answer vectors of Random123 (kat_vectors, "philox4x32 10"): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
_int64 = st.integers(-(2**63), 2**63 - 1)


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The paper's figure in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


def scalar_keep(seed: int, offset: int, stream: int, i: int, j: int, threshold: int) -> bool:
    """docs/semantics.md, Dropout, one element at a time."""
    counter = ((i >> 4) * 8 + (i & 7), (j >> 5) * 4 + ((j & 7) >> 1), stream % 2**32, offset % 2**32)
    words = scalar_philox(counter, (seed & 0xFFFFFFFF, ((seed >> 32) ^ (offset >> 32)) % 2**32))
    n = ((i >> 3) & 1) * 8 + ((j >> 3) & 3) * 2 + (j & 1)
    return (words[n >> 2] >> (8 * (n & 3))) & 255 < threshold


def _words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    return tuple(philox4x32(*(np.array([word], np.uint32) for word in counter), key)[0].tolist())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], output: tuple[int, ...]) -> None:
    assert _words(counter, key) == output
    assert scalar_philox(counter, key) == output


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
def test_vectorised_equals_scalar(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert _words(counter, key) == scalar_philox(counter, key)


@given(_int64, _int64)
def test_key_words_are_32_bit_and_use_both_halves(seed: int, offset: int) -> None:
    k0, k1 = key_words(seed, offset)
    assert k0 == seed % 2**32
    assert k1 == ((seed >> 32) % 2**32) ^ ((offset >> 32) % 2**32)


@given(
    rng=st.tuples(_int64, _int64),
    first=st.tuples(st.integers(0, 70), st.integers(0, 140)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    stream=st.integers(0, 2**33),
    threshold=st.integers(1, 255),
)
def test_keep_mask_equals_the_elementwise_definition(
    rng: tuple[int, int], first: tuple[int, int], size: tuple[int, int], stream: int, threshold: int
) -> None:
    rows, cols = (range(start, start + count) for start, count in zip(first, size, strict=True))
    got = keep_mask(*rng, streams=[stream, stream + 5], rows=rows, cols=cols, threshold=threshold)
    assert got.shape == (2, *size)
    for number, row, col in [(0, 0, 0), (1, -1, -1), (0, size[0] // 2, size[1] // 3), (1, 0, -1)]:
        assert got[number, row, col] == scalar_keep(*rng, stream + 5 * number, rows[row], cols[col], threshold)


def test_keep_mask_equals_the_elementwise_definition_on_every_byte_of_a_group() -> None:
    got = keep_mask(-3, 2**40 + 7, streams=[11], rows=range(32), cols=range(64), threshold=100)
    expected = [[scalar_keep(-3, 2**40 + 7, 11, i, j, 100) for j in range(64)] for i in range(32)]
    np.testing.assert_array_equal(got[0], expected)


def test_oracle_pattern_equals_the_elementwise_definition() -> None:
    inputs = build(Case(heads=3, heads_kv=3, dropout_p=0.3))
    seed, offset = (int(word) for word in inputs.rng)
    got = keep_pattern(inputs, 2, np.array([1]), np.arange(40), np.arange(70))
    expected = [[scalar_keep(seed, offset, 2 * 3 + 1, i, j, keep_threshold(0.3)) for j in range(70)] for i in range(40)]
    np.testing.assert_array_equal(got[0], expected)


def test_pattern_does_not_depend_on_how_it_is_cut() -> None:
    whole = keep_mask(1, 2, streams=[4], rows=range(100), cols=range(200), threshold=128)[0]
    for rows, cols in [
        (range(3, 20), range(200)),
        (range(100), range(33, 34)),
        (range(16, 32), range(64, 96)),
        (range(99, 100), range(7, 150)),
    ]:
        part = keep_mask(1, 2, streams=[4], rows=rows, cols=cols, threshold=128)[0]
        np.testing.assert_array_equal(part, whole[rows.start : rows.stop, cols.start : cols.stop])


def test_empty_ranges_give_empty_patterns() -> None:
    assert keep_mask(1, 2, streams=[0], rows=range(5, 5), cols=range(3), threshold=9).shape == (1, 0, 3)
    assert keep_mask(1, 2, streams=[], rows=range(5), cols=range(3), threshold=9).shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.5, 128), (0.1, 230), (1e-9, 255), (0.9999, 1), (0.17, 212), (1 - 2.5 / 256, 2), (1 - 3.5 / 256, 4)]
)
def test_keep_threshold_rounds_halves_to_even_and_is_clamped(p: float, threshold: int) -> None:
    inputs = build(Case(dropout_p=p))
    assert keep_threshold(p) == threshold
    assert Dropout(p, inputs.rng).keep_threshold == threshold


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate_is_within_five_sigma(p: float) -> None:
    threshold = keep_threshold(p)
    kept = keep_mask(20240607, 0, streams=range(8), rows=range(512), cols=range(512), threshold=threshold)
    expected, count = threshold / 256, kept.size
    assert abs(kept.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_neighbouring_rows_columns_heads_and_seeds_are_uncorrelated() -> None:
    def sign(seed: int, streams: range) -> np.ndarray:
        return keep_mask(seed, 0, streams=streams, rows=range(512), cols=range(512), threshold=128) * 2.0 - 1

    kept = sign(1, range(4))
    five_sigma = 5 / np.sqrt(kept[:2].size / 2)
    pairs = [
        (kept[:, 1:], kept[:, :-1]),
        (kept[:, :, 1:], kept[:, :, :-1]),
        (kept[:, 8:], kept[:, :-8]),
        (kept[:, :, 8:], kept[:, :, :-8]),
        (kept[1:], kept[:-1]),
        (kept, sign(2, range(4))),
    ]
    for left, right in pairs:
        assert abs((left * right).mean()) < five_sigma


def test_offset_and_seed_and_their_high_halves_change_the_pattern() -> None:
    def pattern(seed: int, offset: int) -> bytes:
        return keep_mask(seed, offset, streams=[0], rows=range(32), cols=range(32), threshold=128).tobytes()

    assert len({pattern(*rng) for rng in [(5, 0), (6, 0), (5, 1), (5 + 2**32, 0), (5, 2**33), (-5, 0), (5, -1)]}) == 7
