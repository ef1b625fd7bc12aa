// SPDX-License-Identifier: Apache-2.0
// Numbers in global memory by which blocks wait for each other (PTX ISA, "ld", "st", memory
// consistency model).
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// The number. What its writer did before is then visible.
__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}

// Writes it, behind all that this thread did, or other threads before a barrier.
__device__ __forceinline__ void store_release(int32_t* address, int32_t x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

// The same, where the number is less than x.
__device__ __forceinline__ void raise_release(int32_t* address, int32_t x) {
  asm volatile("red.release.gpu.global.max.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

}  // namespace fa::ptx
