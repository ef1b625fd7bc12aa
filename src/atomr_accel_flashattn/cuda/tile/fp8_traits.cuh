// SPDX-License-Identifier: Apache-2.0
// fp8 numbers for products of f16, which holds them all: four in a word, widened in pairs.
#pragma once

#include "ptx/fp8.cuh"
#include "ptx/types.cuh"

namespace fa {

// kType: E4M3 or E5M2.
template <DType kType>
struct Fp8Traits {
  static_assert(bytes_of(kType) == 1, "a type of 8 bits");

  // Bytes 0 and 1, 2 and 3.
  static __device__ __forceinline__ uint32_t low(uint32_t word) { return widen<false>(word); }
  static __device__ __forceinline__ uint32_t high(uint32_t word) { return widen<true>(word); }
  // Bytes 0 and 2, 1 and 3.
  static __device__ __forceinline__ void even_and_odd(uint32_t word, uint32_t& even, uint32_t& odd) {
    const uint32_t sorted = ptx::pick_bytes<0x3120>(word, 0);
    even = low(sorted), odd = high(sorted);
  }

  // Two numbers, rounded to this type.
  static __device__ __forceinline__ uint32_t rounded(float lo, float hi) {
    return low(kType == DType::F8E4M3 ? ptx::pack_e4m3(lo, hi) : ptx::pack_e5m2(lo, hi));
  }

 private:
  template <bool kHigh>
  static __device__ __forceinline__ uint32_t widen(uint32_t word) {
    return kType == DType::F8E4M3 ? ptx::f16_of_e4m3<kHigh>(word) : ptx::f16_of_e5m2<kHigh>(word);
  }
};

// Products of 8-bit operands. The instruction is of sm_89 and sm_120; other architectures run it in
// f16.
template <DType kA, DType kB>
struct Fp8Products {
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kA == DType::F8E4M3 && kB == DType::F8E4M3) {
      ptx::mma_e4m3_e4m3(d, a, b0, b1);
    } else if constexpr (kA == DType::F8E4M3) {
      ptx::mma_e4m3_e5m2(d, a, b0, b1);
    } else if constexpr (kB == DType::F8E4M3) {
      ptx::mma_e5m2_e4m3(d, a, b0, b1);
    } else {
      ptx::mma_e5m2_e5m2(d, a, b0, b1);
    }
  }
};

}  // namespace fa
