// SPDX-License-Identifier: Apache-2.0
// Transpose of a tile of bytes in shared memory. wgmma takes 8-bit operands K-major only, and V
// lies MN-major.
#pragma once

#include "ptx/mma.cuh"
#include "ptx/stmatrix.cuh"
#include "tile/swizzled_tile.cuh"

namespace fa {

// A tile (kRows keys, kCols columns) becomes (kCols, kRows), and kMore rows behind them are left as
// they are. Within 16 keys their order is
// 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: a lane then holds, of the accumulator S, just the keys
// that are its own in the A operand P of the next product, and no shuffle is needed.
//
// It is cut into parts of 32 keys, a step of wgmma, and 64 columns, which warps share evenly.
template <int kRows, int kCols, int kMore>
struct ByteTranspose {
  using From = SwizzledTile<kRows, kCols, 1>;
  using To = SwizzledTile<kCols + kMore, kRows, 1>;
  static constexpr int kPartKeys = 32, kPartCols = 64, kAcross = kCols / kPartCols, kParts = kRows / kPartKeys * kAcross;
  static constexpr int kLoads = kPartCols / 16;                       // before the first store
  static constexpr int kPartsOfPanel = From::kPanelCols / kPartCols;  // side by side
  static_assert(kRows % kPartKeys == 0 && kCols % kPartCols == 0 && kPartsOfPanel > 0);

  // The first key, and the first chunk of 16 columns.
  static __device__ __forceinline__ int first_key(int part) { return part / kAcross * kPartKeys; }
  static __device__ __forceinline__ int first_chunk(int part) { return part % kAcross * kLoads; }

  // By a warp. ldmatrix.trans takes columns in pairs, which a byte permutation parts. Matrices of
  // even columns alone would store to half of the banks: rows 0-3 of a matrix are even columns and
  // rows 4-7 odd ones, or the other way round.
  static __device__ __forceinline__ void transpose(uint32_t from, uint32_t to, int part) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 8, matrix = lane / 8;
    const int col = 2 * row + ((row >= 4) != (matrix % 2 == 1));
    const uint32_t first = lane < 16 ? 0x6420 : 0x7531, second = lane < 16 ? 0x7531 : 0x6420;
    const int across = part % kAcross;
    from += From::offset(first_key(part) + lane, 0) + across / kPartsOfPanel * From::kPanelBytes;
    to += To::offset(col, (first_key(part) / 16) + matrix / 2) + across * kPartCols * To::kRowBytes;
    uint32_t pairs[kLoads][4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) ptx::ldmatrix_x4_trans(pairs[i], from ^ ((across % kPartsOfPanel * kLoads + i) << 4));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t (&x)[4] = pairs[i];
      const uint32_t bytes[4] = {__byte_perm(x[0], x[1], first), __byte_perm(x[0], x[1], second), __byte_perm(x[2], x[3], first),
                                 __byte_perm(x[2], x[3], second)};
      ptx::stmatrix_x4(to + i * 16 * To::kRowBytes, bytes);
    }
  }
};

}  // namespace fa
