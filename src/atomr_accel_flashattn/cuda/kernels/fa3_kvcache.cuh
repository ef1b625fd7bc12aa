// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper over a cache of K and V, all of it or a split of the keys: the
// mainloop of fa3_fwd.cuh with another source of K and V. For many rows of q; few ones take
// fa2_kvcache.cuh.
#pragma once

#include "attention/cached_kv.cuh"
#include "kernels/fa3_fwd.cuh"

namespace fa {

template <Config C>
__device__ __forceinline__ void fa3_kvcache(const Fa3KvCacheParams& p) {
  fa3_forward<C, CachedKv<C>>(p);
}

}  // namespace fa
