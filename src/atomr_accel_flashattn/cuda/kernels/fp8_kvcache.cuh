// SPDX-License-Identifier: Apache-2.0
// Forward attention over a cache of fp8 K and V (fa2_kvcache.cuh), with descales.
#pragma once

#include "attention/descales.cuh"
#include "kernels/fa2_kvcache.cuh"

namespace fa {

template <Config C>
__device__ __forceinline__ void fp8_kvcache(const DescaledKvCacheParams& p) {
  fa2_kvcache<C>(p.params, KeyDescales<C, DescaledKvCacheParams>(p));
}

}  // namespace fa
