// SPDX-License-Identifier: Apache-2.0
// The float32 accumulator of dQ: where blocks add what their keys give, and how it is read.
#pragma once

#include "attention/params.cuh"
#include "attention/sequence.cuh"
#include "ptx/reduce.cuh"

namespace fa {

// Sums in float32 are tiles of 16 rows x 8 columns, one after the other along the rows of a head
// and sequence: 128 neighbours that a warp holds as one accumulator of mma.sync, so that it adds
// 512 bytes in a row.
struct SumTile {
  static constexpr int kRows = 16, kCols = 8, kTile = kRows * kCols;
};

// The first row of tiles of a sequence and head, of which each has `tile_rows`. Each sequence
// begins with a new tile; of packed ones, number b, from token `first_row` on, at first_row / 16 +
// b. Parameters come by reference, to be read where they are used: registers are scarce.
template <bool kVarlen>
__device__ __forceinline__ int64_t first_tile_row(const int64_t& first_row, int batch, const int& heads, int head,
                                                  const int64_t& tile_rows) {
  return kVarlen ? head * tile_rows + first_row / SumTile::kRows + batch : (static_cast<int64_t>(batch) * heads + head) * tile_rows;
}

template <bool kVarlen>
struct DqSum : SumTile {
  const BwdParams& p;
  __device__ __forceinline__ explicit DqSum(const BwdParams& params) : p(params) {}

  __device__ __forceinline__ int tiles_across() const { return p.fwd.head_dim / kCols; }
  // The row of tiles that begins with `row`, a multiple of 16.
  __device__ __forceinline__ int64_t tile_row(const Sequence& seq, int batch, int head, int row) const {
    return first_tile_row<kVarlen>(seq.q_row, batch, p.fwd.heads, head, p.dq_tile_rows) + row / kRows;
  }
  // Its first tile.
  __device__ __forceinline__ float* tile(const Sequence& seq, int batch, int head, int row) const {
    return p.dq_sum + tile_row(seq, batch, head, row) * tiles_across() * kTile;
  }
};

}  // namespace fa
