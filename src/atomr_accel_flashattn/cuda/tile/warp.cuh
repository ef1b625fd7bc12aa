// Indices that are the same in all lanes of a warp, and that the compiler knows to be: a branch on them then does not split the warp in its eyes,
// so shuffles and votes behind it need no reconvergence code, and do not part the stretch of code that it may schedule as one.
#pragma once

namespace fa {

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ int warp_index() { return uniform(static_cast<int>(threadIdx.x) / 32); }
__device__ __forceinline__ int warpgroup_index() { return uniform(static_cast<int>(threadIdx.x) / 128); }

}  // namespace fa
