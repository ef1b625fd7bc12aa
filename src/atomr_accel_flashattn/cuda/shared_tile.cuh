// A tile of rows in shared memory: its swizzled layout, how it is filled from global memory, and how fragments leave it.
#pragma once

#include "mask.cuh"
#include "ptx.cuh"

namespace fa {

// Rows of kCols 16-bit elements, kept in 16-byte chunks. Eight rows read at one chunk (what ldmatrix does) must fall into eight different
// bank groups: with rows of 64n elements the low three bits of the chunk are XORed with the row; rows of 64n + 32 elements already alternate
// between the two halves of the banks, so two bits of row / 2 are enough.
template <int kRows, int kCols>
struct SharedTile {
  static_assert(kCols % 32 == 0 && kRows % 16 == 0, "a tile is made of 16 x 32 blocks");
  static constexpr int kPitch = kCols * 2;
  static constexpr int kBytes = kRows * kPitch;
  static constexpr int kChunks = kCols / 8;

  static __device__ __forceinline__ int swizzle(int row) { return kCols % 64 == 0 ? row & 7 : (row >> 1) & 3; }
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) { return row * kPitch + ((chunk ^ swizzle(row)) << 4); }
};

// Fills a SharedTile with all threads of a block. Rows outside a RowRange, and the columns from `cols` on, are written as zero.
template <int kRows, int kCols, int kThreads, bool kAligned, bool kExactCols>
struct TileLoader {
  using Tile = SharedTile<kRows, kCols>;
  // A row is read by 4 or 8 neighbouring threads (64 or 128 contiguous bytes), each striding over its chunks.
  static constexpr int kThreadsPerRow = Tile::kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0, "a thread's rows must share one swizzle");

  const uint16_t* source;  // row 0 of the sequence, at this thread's first chunk
  int64_t row_stride;
  int row, col, cols;
  uint32_t target;  // offset of this thread's first chunk in a tile

  __device__ __forceinline__ TileLoader(const void* base, int64_t stride, int user_cols) {
    row = threadIdx.x / kThreadsPerRow;
    col = threadIdx.x % kThreadsPerRow * 8;
    source = static_cast<const uint16_t*>(base) + col;
    row_stride = stride;
    cols = user_cols;
    target = Tile::offset(row, col / 8);
  }

  __device__ __forceinline__ void load(uint32_t tile, int first_row, RowRange valid) const {
    const uint16_t* src = source + (first_row + row) * row_stride;
    if (kAligned && kExactCols && valid.covers(first_row, kRows)) {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int, int) { ptx::cp_async_16(dst, from); });
    } else if constexpr (kAligned) {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int r, int c) {
        ptx::cp_async_16_or_zero(dst, from, valid.holds(first_row + r) && (kExactCols || c < cols));
      });
    } else {
      each_chunk(tile, src, [&](uint32_t dst, const uint16_t* from, int r, int c) {
        ptx::store_shared_16(dst, gather(from, valid.holds(first_row + r) ? cols - c : 0));
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

  // Eight elements one by one, for pointers or strides that are no multiple of 16 bytes.
  static __device__ __forceinline__ uint4 gather(const uint16_t* from, int count) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t lo = 2 * i < count ? from[2 * i] : 0, hi = 2 * i + 1 < count ? from[2 * i + 1] : 0;
      word[i] = lo | hi << 16;
    }
    return {word[0], word[1], word[2], word[3]};
  }
};

// Fragments of an m16n8k16 product for this lane. A operand (Q): rows x k. B operand from K: keys are rows, k runs along them. B operand from
// V: k runs down the rows, hence the transposing load. Each call reads a 16 x 16 block; `row` must be a multiple of 16.
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
  // block_col counts 16-element columns. Their low bits meet the swizzle by XOR, the rest is added; tiles are 128-byte aligned.
  __device__ __forceinline__ uint32_t at(int row, int block_col) const {
    constexpr int kSwizzled = kCols % 64 == 0 ? 4 : 2;  // 16-element columns inside one swizzle span
    return (lane_base ^ ((block_col % kSwizzled) << 5)) + (block_col / kSwizzled) * (kSwizzled << 5) + row * Tile::kPitch;
  }
};

}  // namespace fa
