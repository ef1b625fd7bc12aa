// SPDX-License-Identifier: Apache-2.0
// red: an atomic addition that returns nothing (PTX ISA, "red").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

__device__ __forceinline__ void add_global(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

}  // namespace fa::ptx
