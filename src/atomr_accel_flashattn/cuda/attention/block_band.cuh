// SPDX-License-Identifier: Apache-2.0
// Tiles of K and V that a block visits: all that its rows see, or one split of them.
#pragma once

#include "attention/mask.cuh"

namespace fa {

template <Config C, bool kSplit = C.split>
struct BlockBand : Band<C> {
  BlockBand() = default;
  __device__ __forceinline__ BlockBand(const FwdParams& p, const Sequence& seq, int first_row, int, int)
      : Band<C>(p, seq, first_row, C.block_m) {}
};

// A split has consecutive tiles in the order of visits, perhaps none; splits differ by one tile.
template <Config C>
struct BlockBand<C, true> : Band<C> {
  int first, last;  // -1: none

  BlockBand() = default;
  __device__ __forceinline__ BlockBand(const FwdParams& p, const Sequence& seq, int first_row, int split, int splits)
      : Band<C>(p, seq, first_row, C.block_m), first(-1), last(-1) {
    const Band<C>& band = *this;
    const int window = max(0, band.tile_end() - band.tile_begin()), sinks = band.sink_tiles();
    const auto tile_at = [&](int visit) { return visit < window ? band.tile_end() - 1 - visit : sinks - 1 - (visit - window); };
    const int share = (window + sinks) / splits, more = (window + sinks) % splits;
    const int begin = split * share + min(split, more), count = share + (split < more);
    if (count == 0) return;
    first = tile_at(begin);
    last = tile_at(begin + count - 1);
  }

  __device__ __forceinline__ int first_tile() const { return first; }
  __device__ __forceinline__ int next_tile(int n) const { return n == last ? -1 : Band<C>::next_tile(n); }
};

}  // namespace fa
