// SPDX-License-Identifier: Apache-2.0
// The float32 accumulator of dQ: where blocks add what their keys give, and how it is read.
#pragma once

#include "attention/params.cuh"
#include "attention/sequence.cuh"
#include "ptx/reduce.cuh"

namespace fa {

// Tiles of 16 rows x 8 columns, one after the other along the rows of a head and sequence: 128
// neighbours that a warp holds as one accumulator of mma.sync, so that it adds 512 bytes in a row.
// Each sequence begins with a new tile; of packed ones, number b begins at tile row q_row / 16 + b.
template <bool kVarlen>
struct DqSum {
  static constexpr int kRows = 16, kCols = 8, kTile = kRows * kCols;
  const BwdParams& p;

  __device__ __forceinline__ int tiles_across() const { return p.fwd.head_dim / kCols; }
  // The row of tiles that begins with `row`, a multiple of 16.
  __device__ __forceinline__ int64_t tile_row(const Sequence& seq, int batch, int head, int row) const {
    const int64_t first =
        kVarlen ? head * p.dq_tile_rows + seq.q_row / kRows + batch : (static_cast<int64_t>(batch) * p.fwd.heads + head) * p.dq_tile_rows;
    return first + row / kRows;
  }
  // Its first tile.
  __device__ __forceinline__ float* tile(const Sequence& seq, int batch, int head, int row) const {
    return p.dq_sum + tile_row(seq, batch, head, row) * tiles_across() * kTile;
  }
};

}  // namespace fa
