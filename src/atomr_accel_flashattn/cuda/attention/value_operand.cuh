// SPDX-License-Identifier: Apache-2.0
// V as the B operand of wgmma, for the FA3 family: 16-bit tiles as TMA brings them, 8-bit ones
// transposed by warps of the producer.
#pragma once

#include "attention/config.cuh"
#include "ptx/common.cuh"
#include "tile/layout.cuh"
#include "tile/swizzled_tile.cuh"
#include "tile/transpose.cuh"

namespace fa {

template <Config C, bool kTransposed = bytes_of(C.v_dtype) == 1>
struct ValueOperand {
  using Tile = SwizzledTile<C.block_n, C.v_head_dim, bytes_of(C.v_dtype)>;
  using Loaded = Tile;                  // as TMA brings it
  static constexpr int kWarps = 1;      // that fill a stage
  static constexpr int kRawStages = 0;  // buffers of tiles to transpose

  // B of step k of P V, from column `first` on; here 0.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t tile, int k, int) { return Tile::mn_major(tile, k); }
};

template <Config C>
struct ValueOperand<C, true> {
  using Transpose = ByteTranspose<C.block_n, C.v_head_dim, C.sum_columns>;
  using Tile = typename Transpose::To;
  using Loaded = typename Transpose::From;
  static constexpr int kWarps = 3, kRawStages = C.stages > 1 ? 2 : 1;

  static __device__ __forceinline__ uint64_t descriptor(uint32_t tile, int k, int first) {
    return Tile::k_major(tile, k) + (first * Tile::kRowBytes >> 4);
  }

  // Writes the columns of ones of every stage; nothing else writes there. By all threads of the
  // block, before any of them multiplies.
  static __device__ __forceinline__ void write_sum_columns(uint32_t stages) {
    constexpr int kChunks = C.sum_columns * Tile::kRowBytes / 16;  // of a panel, one like the other
    static_assert(C.v_dtype == DType::F8E5M2, "whose 1 is 0x3c");
    constexpr uint32_t kOnes = 0x3c3c3c3cu;
    for (int i = threadIdx.x; i < C.stages * Tile::kPanels * kChunks; i += 32 * C.warps) {
      const uint32_t panel = stages + i / kChunks * Tile::kPanelBytes;
      ptx::store_shared_16(panel + C.v_head_dim * Tile::kRowBytes + i % kChunks * 16, {kOnes, kOnes, kOnes, kOnes});
    }
    ptx::fence_proxy_async();
  }

  // Warp `warp` of kWarps transposes its share of tile n. Rows that no query sees become zeros
  // first, as a NaN there would survive a probability of zero.
  static __device__ __forceinline__ void transpose(uint32_t loaded, uint32_t tile, int n, const RowRange& seen, int warp) {
    const bool whole = seen.covers(n * C.block_n, C.block_n);
#pragma unroll 1
    for (int part = warp; part < Transpose::kParts; part += kWarps) {
      if (!whole) zero_unseen(loaded, n * C.block_n, part, seen);
      Transpose::transpose(loaded, tile, part);
    }
    ptx::fence_proxy_async();
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ void zero_unseen(uint32_t loaded, int first_key, int part, const RowRange& seen) {
    const int row = Transpose::first_key(part) + static_cast<int>(threadIdx.x) % 32, chunk = Transpose::first_chunk(part);
    if (!seen.contains(first_key + row)) {
#pragma unroll 1
      for (int i = 0; i < Transpose::kLoads; ++i) ptx::store_shared_16(loaded + Loaded::offset(row, chunk + i), {0, 0, 0, 0});
    }
    __syncwarp();
  }
};

}  // namespace fa
