// wgmma: asynchronous products of a warpgroup, and its registers (PTX ISA, "wgmma", "setmaxnreg"), sm_90a.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// setmaxnreg: registers move from the warpgroup that loads to those that compute.
template <int kRegisters>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma: asynchronous products of a warpgroup. fence orders register writes before them, commit closes a group, wait leaves `kPending` groups.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Nothing: registers that an asynchronous product has written are read from here on, not before.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[t][e])::"memory");
}

// wgmma.mma_async m64nNk16: d (+)= a b. The two sizes that a kernel needs are written out for it (jit/wgmma.py).
//   keys(d, a, b, accumulate): a and b from shared memory, both with k contiguous: S = Q K^T
//   values(d, a, b): a from registers, b from shared memory with n contiguous: O += P V
template <int kN, DType kDType>
struct Wgmma;

}  // namespace fa::ptx
