"""Which queries see a key tile: ``Band::queries`` and ``Band::query_tiles`` of cuda/attention/mask.cuh against asking every pair."""

from __future__ import annotations

import ctypes
import itertools

import pytest

from .build import compiler, load

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

BLOCK_M = 4
UNBOUNDED = 1 << 30
_SOURCE = """
#include "attention/mask.cuh"
namespace {
template <bool kLeft, bool kRight, bool kSinks>
void ask(const fa::FwdParams& p, int first_key, int count, int* out) {
  constexpr fa::Config C{.block_m = %d, .block_n = 16, .left_bound = kLeft, .right_bound = kRight, .sink_tokens = kSinks};
  const fa::Band<C> band(p, fa::Sequence{p.seqlen_q, p.seqlen_k, 0, 0, 0}, 0, p.seqlen_q);
  const fa::RowRange rows = band.queries(first_key, count);
  const fa::TileRange tiles = band.query_tiles(first_key, count);
  out[0] = rows.begin, out[1] = rows.end, out[2] = tiles.begin, out[3] = tiles.end;
}
}
extern "C" void query_tiles(int length_q, int length_k, int left, int right, int sinks, int first_key, int count, int* out) {
  fa::FwdParams p{};
  p.seqlen_q = length_q, p.seqlen_k = length_k, p.window_left = left, p.window_right = right, p.sink_tokens = sinks;
  const bool l = left < fa::kUnbounded, r = right < fa::kUnbounded;
  if (l && sinks) return r ? ask<true, true, true>(p, first_key, count, out) : ask<true, false, true>(p, first_key, count, out);
  if (l) return r ? ask<true, true, false>(p, first_key, count, out) : ask<true, false, false>(p, first_key, count, out);
  return r ? ask<false, true, false>(p, first_key, count, out) : ask<false, false, false>(p, first_key, count, out);
}
"""


BANDS = [
    (left, right, sinks)
    for left, right, sinks in itertools.product((0, 1, 3, 9, UNBOUNDED), (0, 2, 7, UNBOUNDED), (0, 1, 5))
    if left != UNBOUNDED or not sinks  # sink tokens lift a left bound
]


@pytest.mark.parametrize(("left", "right", "sinks"), BANDS, ids=str)
def test_queries_of_a_key_tile(left: int, right: int, sinks: int):
    library = load(_SOURCE % BLOCK_M)
    for length_q, length_k, count in itertools.product((0, 1, 3, 8, 13), (0, 1, 5, 12), (1, 4, 16)):
        for first_key in range(0, length_k, count):
            keys = range(first_key, min(first_key + count, length_k))
            positions = range(length_k - length_q, length_k)
            seeing = [i for i, p in enumerate(positions) if any(j <= p + right and (j >= p - left or j < sinks) for j in keys)]
            out = (ctypes.c_int * 4)()
            library.query_tiles(length_q, length_k, left, right, sinks, first_key, count, out)
            case = f"q {length_q}, k {length_k}, keys {keys}"
            assert list(range(out[0], out[1])) == seeing, case
            assert sorted({i // BLOCK_M for i in seeing}) == list(range(out[2], out[3])), case
