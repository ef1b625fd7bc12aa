// SPDX-License-Identifier: Apache-2.0
// A product of two tiles by all warps of a block, with mma.sync.
#pragma once

#include "tile/fragment.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

// Into how many bands of rows warps cut kRows x kCols numbers, so that each reads the least: a warp
// with m x n of them reads m + n rows and columns of the operands. Of equals the most bands.
constexpr int bands_of_rows(int rows, int cols, int warps) {
  int best = 0, least = 1 << 30;
  for (int down = 1; down <= warps; down *= 2) {
    const int across = warps / down;
    if (warps % down != 0 || rows % (16 * down) != 0 || cols % (16 * across) != 0) continue;
    const int reads = rows / down + cols / across;
    if (reads <= least) best = down, least = reads;
  }
  return best;
}

// kRows x kCols numbers, cut among kWarps. This warp has kBlocks blocks of 16 rows and kTiles tiles
// of 8 columns, from (row(), col()) on.
template <DType kDType, int kRows, int kCols, int kWarps, int kDown = bands_of_rows(kRows, kCols, kWarps)>
struct WarpProduct {
  static_assert(kDown > 0, "warps share 16 x 16 blocks evenly");
  static constexpr int kAcross = kWarps / kDown;
  static constexpr int kBlocks = kRows / (16 * kDown), kTiles = kCols / (8 * kAcross);
  static constexpr int kWarpRows = 16 * kBlocks, kWarpCols = 8 * kTiles;
  using Accumulator = float[kBlocks][kTiles][4];

  static __device__ __forceinline__ int row() { return warp_index() % kDown * kWarpRows; }
  static __device__ __forceinline__ int col() { return warp_index() / kDown * kWarpCols; }

  static __device__ __forceinline__ void clear(Accumulator& x) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[b][t][e] = 0.f;
  }

  // d += A B over kSteps steps of 16. read_a(a, row, k) and read_b(b, col, k) read the fragments of
  // a 16 x 16 block; beside(k) is done beside step k.
  template <int kSteps, class ReadA, class ReadB>
  static __device__ __forceinline__ void multiply(Accumulator& d, ReadA read_a, ReadB read_b) {
    multiply<kSteps>(d, read_a, read_b, [](int) {});
  }
  template <int kSteps, class ReadA, class ReadB, class Beside>
  static __device__ __forceinline__ void multiply(Accumulator& d, ReadA read_a, ReadB read_b, Beside beside) {
    const int first_row = row(), first_col = col();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) read_a(a[b], first_row + 16 * b, k);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t bk[4];
        read_b(bk, first_col + 8 * t, k);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          MmaTraits<kDType>::mma(d[b][t], a[b], bk[0], bk[1]);
          MmaTraits<kDType>::mma(d[b][t + 1], a[b], bk[2], bk[3]);
        }
      }
      beside(k);
    }
  }
};

// Readers of the operands that a SharedTile holds. A (rows x k): a row of A a row of the tile, or,
// transposed, a column. B (k x columns): a column of B a row of the tile, or, transposed, a column.
template <int kRows, int kCols>
struct Operand {
  using Reader = FragmentReader<kRows, kCols>;
  static __device__ __forceinline__ auto a(uint32_t tile) {
    return [read = Reader::rows_then_chunks(tile)](uint32_t (&r)[4], int row, int k) { read.read(r, row, k); };
  }
  static __device__ __forceinline__ auto a_transposed(uint32_t tile) {
    return [read = Reader::chunks_then_rows(tile)](uint32_t (&r)[4], int row, int k) { read.read_transposed(r, 16 * k, row / 16); };
  }
  static __device__ __forceinline__ auto b(uint32_t tile) {
    return [read = Reader::chunks_then_rows(tile)](uint32_t (&r)[4], int col, int k) { read.read(r, col, k); };
  }
  static __device__ __forceinline__ auto b_transposed(uint32_t tile) {
    return [read = Reader::rows_then_chunks(tile)](uint32_t (&r)[4], int col, int k) { read.read_transposed(r, 16 * k, col / 16); };
  }
};

}  // namespace fa
