// SPDX-License-Identifier: Apache-2.0
// Layout of a tile in shared memory, and which of its rows are valid.
#pragma once

#include "ptx/types.cuh"

namespace fa {

// Rows of kCols 16-bit elements in 16-byte chunks, swizzled against bank conflicts: ldmatrix reads
// one chunk of eight rows, which must fall into eight bank groups. With rows of 64n elements the
// low three bits of the chunk are XORed with the row. Rows of 64n + 32 elements already alternate
// between the two halves of the banks, so two bits of row / 2 are enough; of four rows of 16 or 48
// elements each begins in another quarter, and one bit of row / 4 is. A tile of 8-bit elements is
// one of half as many pairs.
template <int kRows, int kCols>
struct SharedTile {
  static_assert((kCols % 32 == 0 || kCols == 16 || kCols == 48) && kRows % 16 == 0, "a tile is made of 16 x 16 blocks");
  static constexpr int kPitch = kCols * 2;
  static constexpr int kBytes = kRows * kPitch;
  static constexpr int kChunks = kCols / 8;

  static __device__ __forceinline__ int swizzle(int row) {
    return kCols % 64 == 0 ? row & 7 : kCols % 32 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
  }
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) { return row * kPitch + ((chunk ^ swizzle(row)) << 4); }
};

// Valid rows: [begin, end), and those below `sinks`.
struct RowRange {
  int begin, end, sinks;
  __device__ __forceinline__ bool contains(int row) const { return row < end && (row >= begin || row < sinks); }
  __device__ __forceinline__ bool covers(int row, int count) const { return row + count <= end && row >= begin; }
};

}  // namespace fa
