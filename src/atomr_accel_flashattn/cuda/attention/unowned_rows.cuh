// SPDX-License-Identifier: Apache-2.0
// Packed rows of q past the last sequence: nobody computes them, and their memory is not left as it
// was.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/common.cuh"

namespace fa {

// O = 0 and LSE = -inf, as of a row that sees no key, for rows `first`, `first + step`, ... past
// the last sequence.
template <Config C>
__device__ __forceinline__ void write_unowned_rows(const FwdParams& p, int first, int step, int thread, int threads) {
  if constexpr (C.varlen) {
    const int64_t rows = p.lse_head_stride;  // of the packed q
    for (int64_t row = int64_t{p.cu_seqlens_q[p.batch]} + first; row < rows; row += step) {
      for (int head = 0; head < p.heads; ++head) {
        auto* o = static_cast<Bits<C.out_dtype>*>(p.o) + row * p.o_stride.row + head * p.o_stride.head;
        for (int col = thread; col < p.v_head_dim; col += threads) o[col] = 0;
        if (p.lse && thread == 0) p.lse[head * p.lse_head_stride + row] = negative_infinity();
      }
    }
  }
}

}  // namespace fa
