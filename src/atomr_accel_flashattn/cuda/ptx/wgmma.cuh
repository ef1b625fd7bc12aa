// SPDX-License-Identifier: Apache-2.0
// wgmma: asynchronous products of a warpgroup, sm_90a (PTX ISA, "wgmma", "setmaxnreg").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// Registers per thread of this warpgroup: the producer gives up what the consumers take.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// fence orders register writes before wgmma; commit closes a group; wait leaves `kPending` in
// flight.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Warpgroup operand fence: keeps the compiler from moving reads of an accumulator before the wait.
// No instruction.
template <int kTiles>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[t][e])::"memory");
}

// wgmma.mma_async m64nN, k of 32 bytes: d (+)= a b. kernels/wgmma.py writes out the sizes N of a
// kernel.
//   ss(d, a, b, accumulate): a and b from shared memory, both K-major: S = Q K^T
//   rs(d, a, b): a from registers, b from shared memory, MN-major: O += P V; rs<false>: d = a b
template <int kN, DType kA, DType kB>
struct Wgmma;

}  // namespace fa::ptx
