// SPDX-License-Identifier: Apache-2.0
// red: an atomic addition that returns nothing (PTX ISA, "red").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// Adds four floats of each lane of a warp to 128 neighbours in global memory, one by one. From
// sm_90 on a lane's four are neighbours, and one instruction adds them; before, an instruction adds
// one of each lane.
__device__ __forceinline__ void add_global_fragment(float* block, const float (&x)[4]) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(block + 4 * lane), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
  asm volatile(
      "red.global.add.f32 [%0], %1;\n"
      "red.global.add.f32 [%0+128], %2;\n"
      "red.global.add.f32 [%0+256], %3;\n"
      "red.global.add.f32 [%0+384], %4;\n" ::"l"(block + lane),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
      : "memory");
#endif
}

// Writes them.
__device__ __forceinline__ void store_global_fragment(float* block, const float (&x)[4]) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  *reinterpret_cast<float4*>(block + 4 * lane) = {x[0], x[1], x[2], x[3]};
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) block[32 * i + lane] = x[i];
#endif
}

// This lane's four of those 128.
__device__ __forceinline__ void load_global_fragment(float (&x)[4], const float* block) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  const float4 four = *reinterpret_cast<const float4*>(block + 4 * lane);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = block[32 * i + lane];
#endif
}

}  // namespace fa::ptx
