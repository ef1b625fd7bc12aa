// SPDX-License-Identifier: Apache-2.0
// Swizzled tile, the layout of TMA and wgmma: panels of as many columns as 128 (or 64, or 32) bytes
// hold, whose rows the hardware swizzles over 8 (4, 2) of 128 bytes.
#pragma once

#include "ptx/tma.cuh"

namespace fa {

template <int kRows, int kCols, int kElementBytes>
struct SwizzledTile {
  static constexpr int kRowBytes = kCols * kElementBytes % 128 == 0 ? 128 : kCols * kElementBytes % 64 == 0 ? 64 : 32;
  static constexpr int kPanelCols = kRowBytes / kElementBytes;
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kGroupBytes = 8 * kRowBytes;  // stride of descriptors: 8 rows
  static_assert(kPanelBytes % kGroupBytes == 0, "panels start on a swizzle period");

  // One TMA load a panel; all complete on the same mbarrier.
  static __device__ __forceinline__ void load(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int head, int batch,
                                              uint64_t policy) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tma_load(tile + panel * kPanelBytes, map, barrier, panel * kPanelCols, row, head, batch, policy);
    }
  }

  // The same from a tensor whose rows interleave the heads of a group (pack_gqa).
  static __device__ __forceinline__ void load_packed(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int group, int batch,
                                                     uint64_t policy) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tma_load(tile + panel * kPanelBytes, map, barrier, panel * kPanelCols, 0, row, group, batch, policy);
    }
  }

  // Descriptor of a K-major operand (Q, K): k runs along the columns. `k` counts steps of the
  // product: 32 bytes, whatever the type.
  static __device__ __forceinline__ uint64_t k_major(uint32_t tile, int k) {
    constexpr int kSteps = kRowBytes / 32;
    return descriptor(tile, 16) + ((k / kSteps * kPanelBytes + k % kSteps * 32) >> 4);
  }
  // Descriptor of an MN-major operand (V of 16 bits): k runs down the rows. `k` counts steps of 16
  // rows.
  static __device__ __forceinline__ uint64_t mn_major(uint32_t tile, int k) {
    static_assert(kElementBytes == 2, "wgmma takes 8-bit operands K-major only");
    return descriptor(tile, kPanelBytes) + ((k * 16 * kRowBytes) >> 4);
  }

  // Byte offset of a chunk of 16 bytes, for st.shared.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    constexpr int kChunks = kRowBytes / 16;
    const int swizzle = kRowBytes == 128 ? row & 7 : kRowBytes == 64 ? (row >> 1) & 3 : (row >> 2) & 1;
    return chunk / kChunks * kPanelBytes + row * kRowBytes + ((chunk % kChunks ^ swizzle) << 4);
  }

 private:
  // Matrix descriptor (PTX ISA, "Matrix descriptor format"): address, leading and stride byte
  // offset in units of 16 bytes, swizzle mode.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading) {
    constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
    return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(kGroupBytes >> 4) << 32 |
           kSwizzle << 62;
  }
};

}  // namespace fa
