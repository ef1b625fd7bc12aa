// SPDX-License-Identifier: Apache-2.0
// Transpose of a tile of bytes in shared memory. wgmma takes 8-bit operands K-major only, and V
// lies MN-major.
#pragma once

#include "ptx/mma.cuh"
#include "ptx/stmatrix.cuh"
#include "tile/swizzled_tile.cuh"

namespace fa {

// A tile (kRows keys, kCols columns) becomes (kCols, kRows). Within 16 keys their order is
// 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: a lane then holds, of the accumulator S, just the keys
// that are its own in the A operand P of the next product, and no shuffle is needed.
template <int kRows, int kCols>
struct ByteTranspose {
  using From = SwizzledTile<kRows, kCols, 1>;
  using To = SwizzledTile<kCols, kRows, 1>;
  static constexpr int kGroup = 32, kGroups = kRows / kGroup;  // keys of a step of wgmma
  static constexpr int kInFlight = 4;                          // loads before the first store
  static constexpr int kChunks = From::kRowBytes / 16;         // of a panel
  static_assert(kRows % kGroup == 0 && kChunks % kInFlight == 0);

  // A warp transposes keys 32 `group` to 32 `group` + 31. ldmatrix.trans takes columns in pairs,
  // which a byte permutation parts. Matrices of even columns alone would store to half of the
  // banks: rows 0-3 of a matrix are even columns and rows 4-7 odd ones, or the other way round.
  static __device__ __forceinline__ void transpose(uint32_t from, uint32_t to, int group) {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 8, matrix = lane / 8;
    const int col = 2 * row + ((row >= 4) != (matrix % 2 == 1)), chunk = 2 * group + matrix / 2;
    const uint32_t first = lane < 16 ? 0x6420 : 0x7531, second = lane < 16 ? 0x7531 : 0x6420;
    from += From::offset(group * kGroup + lane, 0);
    to += To::offset(col, chunk);
#pragma unroll 1
    for (int panel = 0; panel < From::kPanels; ++panel) {
#pragma unroll 1
      for (int c = 0; c < kChunks; c += kInFlight) {
        uint32_t pairs[kInFlight][4];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) ptx::ldmatrix_x4_trans(pairs[i], from ^ ((c + i) << 4));
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const uint32_t (&x)[4] = pairs[i];
          const uint32_t bytes[4] = {__byte_perm(x[0], x[1], first), __byte_perm(x[0], x[1], second), __byte_perm(x[2], x[3], first),
                                     __byte_perm(x[2], x[3], second)};
          ptx::stmatrix_x4(to + (c + i) * 16 * To::kRowBytes, bytes);
        }
      }
      from += From::kPanelBytes;
      to += From::kPanelCols * To::kRowBytes;
    }
  }
};

}  // namespace fa
