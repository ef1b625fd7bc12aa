// SPDX-License-Identifier: Apache-2.0
// The float32 parts of dK and dV where blocks share keys, each with some query heads of the group:
// what a block leaves, and what bwd_postprocess adds in one order. Nobody adds to a part in memory,
// so that none has to be cleared, and gradients are the same from run to run.
#pragma once

#include "attention/dq_sum.cuh"

namespace fa {

// Behind the sum of dQ in its array, laid out like it; in a row of tiles those of dK, then of dV.
template <bool kVarlen>
struct KvParts : SumTile {
  const BwdParams& p;
  __device__ __forceinline__ explicit KvParts(const BwdParams& params) : p(params) {}

  __device__ __forceinline__ int tiles_across() const { return (p.fwd.head_dim + p.fwd.v_head_dim) / kCols; }
  // From one part of a KV head to the next.
  __device__ __forceinline__ int64_t part_stride() const { return p.kv_tile_rows * tiles_across() * kTile; }
  // The first tile of the row of tiles that begins with key `row`, a multiple of 16. Parts are
  // counted over all KV heads.
  __device__ __forceinline__ float* tile(const Sequence& seq, int batch, int part, int row) const {
    const int64_t first = first_tile_row<kVarlen>(seq.k_row, batch, p.heads_kv * p.head_splits, part, p.kv_tile_rows);
    return p.dq_sum + p.kv_parts + (first + row / kRows) * tiles_across() * kTile;
  }
};

}  // namespace fa
