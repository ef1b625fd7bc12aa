// SPDX-License-Identifier: Apache-2.0
// Warp-uniform indices. The compiler sees that a branch on them does not diverge: shuffles and
// votes behind it need no reconvergence code, and do not end the region that it schedules as one.
#pragma once

namespace fa {

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ int warp_index() { return uniform(static_cast<int>(threadIdx.x) / 32); }
__device__ __forceinline__ int warpgroup_index() { return uniform(static_cast<int>(threadIdx.x) / 128); }

}  // namespace fa
