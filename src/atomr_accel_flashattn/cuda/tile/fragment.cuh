// SPDX-License-Identifier: Apache-2.0
// Fragments of mma.sync, read from shared memory with ldmatrix.
#pragma once

#include "ptx/mma.cuh"
#include "tile/layout.cuh"

namespace fa {

// This lane's fragments of m16n8k16. A operand (Q): rows x k. B operand from K: a key a row, k runs
// along it. B operand from V: k runs down the rows, hence ldmatrix.trans. Each call reads a 16 x 16
// block; `row` must be a multiple of 16.
template <int kRows, int kCols>
struct FragmentReader {
  using Tile = SharedTile<kRows, kCols>;
  uint32_t lane_base;

  // lanes 0-15: rows 0-15 of the left chunk; lanes 16-31: the same rows of the right chunk
  static __device__ __forceinline__ FragmentReader rows_then_chunks(uint32_t tile) {
    const int lane = threadIdx.x % 32;
    return {tile + Tile::offset(lane % 16, lane / 16)};
  }
  // lanes 0-7 and 8-15: rows 0-7 of the left and the right chunk; lanes 16-31: rows 8-15 likewise
  static __device__ __forceinline__ FragmentReader chunks_then_rows(uint32_t tile) {
    const int lane = threadIdx.x % 32;
    return {tile + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }

  __device__ __forceinline__ void read(uint32_t (&r)[4], int row, int block_col) const { ptx::ldmatrix_x4(r, at(row, block_col)); }
  __device__ __forceinline__ void read_transposed(uint32_t (&r)[4], int row, int block_col) const {
    ptx::ldmatrix_x4_trans(r, at(row, block_col));
  }

 private:
  // block_col counts 16-element columns. Its low bits are XORed with the swizzle, the others added;
  // tiles are 128-byte aligned.
  __device__ __forceinline__ uint32_t at(int row, int block_col) const {
    // 16-element columns in a swizzle span.
    constexpr int kSwizzled = kCols % 64 == 0 ? 4 : kCols % 32 == 0 ? 2 : 1;
    return (lane_base ^ ((block_col % kSwizzled) << 5)) + (block_col / kSwizzled) * (kSwizzled << 5) + row * Tile::kPitch;
  }
};

}  // namespace fa
