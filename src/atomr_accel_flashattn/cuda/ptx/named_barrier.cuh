// SPDX-License-Identifier: Apache-2.0
// Named barriers of a block (PTX ISA, "bar").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// bar.sync waits, bar.arrive does not; both count towards the `threads` of barrier `id`.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fa::ptx
