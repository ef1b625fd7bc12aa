// SPDX-License-Identifier: Apache-2.0
// MMA traits of an element type: the mma instruction, and packing of its operands.
#pragma once

#include "ptx/common.cuh"
#include "ptx/mma.cuh"

namespace fa {

template <DType kDType>
struct MmaTraits {
  static constexpr int kStep = 32 / bytes_of(kDType);  // k of one product: 32 bytes
  static constexpr bool kIsFp8 = bytes_of(kDType) == 1;

  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kDType == DType::F16) {
      ptx::mma_f16(d, a, b0, b1);
    } else {
      ptx::mma_bf16(d, a, b0, b1);
    }
  }
  // A pair: of 16 bits each, or the low half of a word.
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    if constexpr (kDType == DType::F16) {
      return ptx::pack_f16(lo, hi);
    } else if constexpr (kDType == DType::F8E4M3) {
      return ptx::pack_e4m3(lo, hi);
    } else if constexpr (kDType == DType::F8E5M2) {
      return ptx::pack_e5m2(lo, hi);
    } else {
      return ptx::pack_bf16(lo, hi);
    }
  }
  static __device__ __forceinline__ float widen(uint32_t bits) {
    if constexpr (kDType == DType::F16) {
      return ptx::widen_f16(bits);
    } else {
      return ptx::widen_bf16(bits);
    }
  }
};

}  // namespace fa
