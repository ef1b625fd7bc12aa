// SPDX-License-Identifier: Apache-2.0
// Loads a tile from global to shared memory with cp.async.
#pragma once

#include "ptx/common.cuh"
#include "ptx/cp_async.cuh"
#include "tile/layout.cuh"

namespace fa {

// 16 bytes of elements one by one: pointers or strides that are no multiple of 16 bytes.
__device__ __forceinline__ uint4 gather(const uint16_t* from, int count) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t lo = 2 * i < count ? from[2 * i] : 0, hi = 2 * i + 1 < count ? from[2 * i + 1] : 0;
    word[i] = lo | hi << 16;
  }
  return {word[0], word[1], word[2], word[3]};
}
__device__ __forceinline__ uint4 gather(const uint8_t* from, int count) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < count) word[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
  return {word[0], word[1], word[2], word[3]};
}

// Loads a SharedTile with all threads of a block. Rows outside `valid`, and columns from `cols` on,
// are zero-filled.
template <int kRows, int kCols, int kThreads, bool kAligned, bool kExactCols>
struct TileLoader {
  using Tile = SharedTile<kRows, kCols>;
  // Coalescing: 4 or 8 neighbouring threads read 64 or 128 contiguous bytes of a row.
  static constexpr int kThreadsPerRow = Tile::kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0, "a thread's rows must share one swizzle");

  const uint16_t* source;  // row 0 of the sequence, first chunk of this thread
  int64_t row_stride;
  int row, col, cols;
  uint32_t target;  // offset of this thread's first chunk in the tile

  __device__ __forceinline__ TileLoader(const void* base, int64_t stride, int user_cols) {
    row = threadIdx.x / kThreadsPerRow;
    col = threadIdx.x % kThreadsPerRow * 8;
    source = static_cast<const uint16_t*>(base) + col;
    row_stride = stride;
    cols = user_cols;
    target = Tile::offset(row, col / 8);
  }

  __device__ __forceinline__ void load(uint32_t tile, int first_row, RowRange valid) const {
    load_from(source + (first_row + row) * row_stride, tile, first_row, valid);
  }

  // The same, given the address of this thread's first chunk.
  __device__ __forceinline__ void load_from(const uint16_t* src, uint32_t tile, int first_row, RowRange valid) const {
    if (kAligned && kExactCols && valid.covers(first_row, kRows)) {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int, int) { ptx::cp_async_16(dst, from); });
    } else if constexpr (kAligned) {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int r, int c) {
        ptx::cp_async_16_or_zero(dst, from, valid.contains(first_row + r) && (kExactCols || c < cols));
      });
    } else {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int r, int c) {
        ptx::store_shared_16(dst, gather(from, valid.contains(first_row + r) ? cols - c : 0));
      });
    }
  }

 private:
  template <class Copy>
  __device__ __forceinline__ void each_chunk(uint32_t tile, const uint16_t* src, Copy copy) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = row + pass * kRowsPerPass;
      if (kRows % kRowsPerPass == 0 || r < kRows) {
#pragma unroll
        for (int step = 0; step < Tile::kChunks / kThreadsPerRow; ++step) {
          const int c = step * kThreadsPerRow * 8;
          copy(tile + target + pass * kRowsPerPass * Tile::kPitch + c * 2, src + c, r, col + c);
        }
      }
      src += kRowsPerPass * row_stride;
    }
  }
};

}  // namespace fa
