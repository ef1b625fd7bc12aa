// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper over fp8 tensors (FlashAttention-3, section 3.3): the mainloop of
// fa3_fwd.cuh with 8-bit wgmma, V transposed by producer warps, and factors of q, k and v.
#pragma once

#include "kernels/fa3_fwd.cuh"

namespace fa {

template <Config C>
__device__ __forceinline__ void fa3_fp8(const Fa3Fp8FwdParams& p) {
  fa3_forward<C, TensorKv<C, Fa3Fp8FwdParams>>(p);
}

}  // namespace fa
