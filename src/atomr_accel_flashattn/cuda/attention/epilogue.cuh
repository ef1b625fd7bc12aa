// SPDX-License-Identifier: Apache-2.0
// Epilogue: denominator, log-sum-exp, and stores of O.
#pragma once

#include "attention/config.cuh"
#include "attention/softmax.cuh"
#include "ptx/common.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

// Denominator and log-sum-exp of one row, computed in log2 units. A learned sink joins both here,
// once.
struct RowResult {
  float scale;  // of the accumulated output
  float lse;    // natural logarithm
};

template <Config C>
__device__ __forceinline__ RowResult finalize_row(float sum, float max_log2, float sink_log2) {
  if constexpr (C.learned_sink) {
    if (sum == 0.f && sink_log2 == negative_infinity()) return {0.f, negative_infinity()};
    const float top = fmaxf(max_log2, sink_log2);
    const float shrink = ptx::exp2(max_log2 - top);
    sum = fmaf(sum, shrink, ptx::exp2(sink_log2 - top));
    return {shrink * ptx::reciprocal(sum), (top + ptx::log2(sum)) * kLn2};
  }
  if (sum == 0.f) return {0.f, negative_infinity()};
  return {ptx::reciprocal(sum), (max_log2 + ptx::log2(sum)) * kLn2};
}

// 4 x 4 transpose within a quad, for 16-byte stores: of 32 columns of a row, lane q holds word q of
// four 8-column tiles before, and the four words of tile q after.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane & 1, high = lane & 2;
  uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1), y = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  (odd ? w[0] : w[1]) = x;
  (odd ? w[2] : w[3]) = y;
  x = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2), y = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
  (high ? w[0] : w[2]) = x;
  (high ? w[1] : w[3]) = y;
}

// Stores this lane's 8 of those 32 columns.
template <Config C>
__device__ __forceinline__ void store_quad(uint16_t* row, int col, int cols, const uint32_t (&w)[4]) {
  col += threadIdx.x % 4 * 8;
  if (!C.exact_head_dim && col >= cols) return;
  if constexpr (C.aligned) {
    *reinterpret_cast<uint4*>(row + col) = {w[0], w[1], w[2], w[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (col + i < cols) row[col + i] = static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)));
    }
  }
}

// Stores two neighbouring columns that one lane holds.
template <Config C>
__device__ __forceinline__ void store_pair(uint16_t* row, int col, int cols, uint32_t pair) {
  if constexpr (C.aligned) {
    if (C.exact_head_dim || col < cols) *reinterpret_cast<uint32_t*>(row + col) = pair;
  } else {
    if (col < cols) row[col] = static_cast<uint16_t>(pair);
    if (col + 1 < cols) row[col + 1] = static_cast<uint16_t>(pair >> 16);
  }
}

// The same in the type of O.
template <Config C>
__device__ __forceinline__ void store_two(Bits<C.out_dtype>* row, int col, int cols, float x, float y) {
  if constexpr (C.out_dtype == DType::F32) {
    auto* target = reinterpret_cast<float*>(row) + col;
    if constexpr (C.aligned) {
      if (C.exact_head_dim || col < cols) *reinterpret_cast<float2*>(target) = {x, y};
    } else {
      if (col < cols) target[0] = x;
      if (col + 1 < cols) target[1] = y;
    }
  } else {
    store_pair<C>(row, col, cols, MmaTraits<C.out_dtype>::pack(x, y));
  }
}

}  // namespace fa
