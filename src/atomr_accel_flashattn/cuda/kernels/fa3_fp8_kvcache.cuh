// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper over a cache of fp8 K and V, with many rows of an fp8 q: the mainloop
// of fa3_fp8.cuh with the source of K and V of fa3_kvcache.cuh.
#pragma once

#include "attention/cached_kv.cuh"
#include "kernels/fa3_fwd.cuh"

namespace fa {

template <Config C>
__device__ __forceinline__ void fa3_fp8_kvcache(const Fa3Fp8KvCacheParams& p) {
  fa3_forward<C, CachedKv<C, Fa3Fp8KvCacheParams>>(p);
}

}  // namespace fa
