// SPDX-License-Identifier: Apache-2.0
// Local memory of a thread, by address: arrays that shall not be held in registers (PTX ISA, "st",
// "ld").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

__device__ __forceinline__ uint64_t local_address(const void* p) { return __cvta_generic_to_local(p); }

__device__ __forceinline__ void store_local_16(uint64_t dst, const float (&x)[4]) {
  asm volatile("st.local.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
__device__ __forceinline__ void load_local_16(float (&x)[4], uint64_t src) {
  asm volatile("ld.local.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(src) : "memory");
}

}  // namespace fa::ptx
