// SPDX-License-Identifier: Apache-2.0
// fp8 numbers for products in 16 bits: four in a word, widened in pairs to the type of the product.
#pragma once

#include "ptx/fp8.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

// kFrom: E4M3 or E5M2. kTo: F16 or BF16, which hold them all.
template <DType kFrom, DType kTo>
struct Fp8Traits {
  static_assert(bytes_of(kFrom) == 1 && bytes_of(kTo) == 2, "from 8 bits to 16");

  // Bytes 0 and 1, 2 and 3.
  static __device__ __forceinline__ uint32_t low(uint32_t word) { return widen<false>(word); }
  static __device__ __forceinline__ uint32_t high(uint32_t word) { return widen<true>(word); }
  // Bytes 0 and 2, 1 and 3.
  static __device__ __forceinline__ void even_and_odd(uint32_t word, uint32_t& even, uint32_t& odd) {
    const uint32_t sorted = ptx::pick_bytes<0x3120>(word, 0);
    even = low(sorted), odd = high(sorted);
  }

  // Two numbers, rounded to kFrom.
  static __device__ __forceinline__ uint32_t rounded(float lo, float hi) {
    return widen<false>(kFrom == DType::F8E4M3 ? ptx::pack_e4m3(lo, hi) : ptx::pack_e5m2(lo, hi));
  }

 private:
  template <bool kHigh>
  static __device__ __forceinline__ uint32_t widen(uint32_t word) {
    const uint32_t halves = kFrom == DType::F8E4M3 ? ptx::f16_of_e4m3<kHigh>(word) : ptx::f16_of_e5m2<kHigh>(word);
    if constexpr (kTo == DType::F16) return halves;
    return ptx::pack_bf16(ptx::widen_f16(halves & 0xffff), ptx::widen_f16(halves >> 16));
  }
};

}  // namespace fa
