// SPDX-License-Identifier: Apache-2.0
// Tile scheduler: which rows of which head a block computes.
#pragma once

#include "attention/params.cuh"

namespace fa {

struct WorkTile {
  int block_m, head, batch;
  int split = 0;

  static __device__ __forceinline__ WorkTile none() { return {-1, 0, 0}; }
  __device__ __forceinline__ bool past_end() const { return block_m < 0; }
};

// L2 swizzle: blocks walk the (batch, head) pairs in groups of `section_heads`, sized so that K and
// V of a group stay in L2 while its blocks read them. Within a group all heads run side by side,
// from the last rows to the first: longest tile first under a causal mask, so that the grid ends
// with short ones.
__device__ __forceinline__ WorkTile decode_work_tile(const FwdParams& p, int index) {
  const int pairs = p.batch * p.work_heads;
  const int per_group = p.section_heads * p.blocks_m;
  const int group = index / per_group;
  const int first = group * p.section_heads;
  const int width = min(p.section_heads, pairs - first);
  const int rest = index - group * per_group;
  const int row = rest / width;
  const int pair = first + rest - row * width;
  const int batch = pair / p.work_heads;
  return {p.blocks_m - 1 - row, pair - batch * p.work_heads, batch};
}

// With splits of the keys, those of a work tile lie side by side.
template <bool kSplit, class Params>
__device__ __forceinline__ WorkTile decode_split_tile(const Params& p, int index) {
  if constexpr (kSplit) {
    const int unsplit = index / p.splits;
    WorkTile work = decode_work_tile(p.fwd, unsplit);
    work.split = index - unsplit * p.splits;
    return work;
  } else {
    return decode_work_tile(p.fwd, index);
  }
}

}  // namespace fa
