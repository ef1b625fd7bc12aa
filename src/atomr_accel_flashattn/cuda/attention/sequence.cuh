// SPDX-License-Identifier: Apache-2.0
// Lengths and first rows of one sequence, in dense tensors or in packed ones (varlen).
#pragma once

#include "attention/params.cuh"

namespace fa {

struct Sequence {
  int length_q, length_k;
  int64_t q_row, k_row;  // first row in the packed tensor; 0 if dense
  int batch;             // index along the batch stride; 0 if packed
};

template <bool kVarlen, class Params>
__device__ __forceinline__ Sequence read_sequence(const Params& p, int batch) {
  if constexpr (kVarlen) {
    const int q = p.cu_seqlens_q[batch], k = p.cu_seqlens_k[batch];
    return {p.cu_seqlens_q[batch + 1] - q, p.cu_seqlens_k[batch + 1] - k, q, k, 0};
  } else {
    return {p.seqlen_q, p.seqlen_k, 0, 0, batch};
  }
}

}  // namespace fa
