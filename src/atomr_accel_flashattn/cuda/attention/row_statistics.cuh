// SPDX-License-Identifier: Apache-2.0
// What the backward knows of a row of Q: bwd_preprocess writes it, the other two kernels read it.
#pragma once

#include "attention/params.cuh"

namespace fa {

// LSE in log2 units, and delta less dLSE. A row without keys has an LSE of +inf here, so that its
// probabilities are 0. The array begins with such a row, for rows that do not see any of a block's
// keys; that of number n of the LSE comes behind.
struct RowStatistics {
  float lse_log2, delta;

  static constexpr int kNone = 0;
  static __device__ __forceinline__ int64_t index(int64_t at) { return at + 1; }
};

}  // namespace fa
