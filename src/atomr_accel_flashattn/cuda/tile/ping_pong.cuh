// Warpgroups that multiply in turn.
#pragma once

#include "ptx/named_barrier.cuh"

namespace fa {

// Warpgroups issue their products in turn, so that one multiplies while the others are in their softmax (FlashAttention-3, section 3.1, "pingpong").
// Every warpgroup takes part in every tile that the block visits, also in those that it only passes over. Named barriers 8.. are used.
template <bool kOn, int kWarpgroups>
struct Turns {
  static constexpr int kFirst = 8, kThreads = 256;  // those who wait and those who pass

  // The first warpgroup has the first turn.
  __device__ __forceinline__ void begin(int warpgroup) const {
    if constexpr (kOn && kWarpgroups > 1) {
      if (warpgroup == kWarpgroups - 1) ptx::named_barrier_arrive(kFirst, kThreads);
    }
  }
  __device__ __forceinline__ void wait(int warpgroup) const {
    if constexpr (kOn && kWarpgroups > 1) ptx::named_barrier_sync(kFirst + warpgroup, kThreads);
  }
  __device__ __forceinline__ void pass(int warpgroup) const {
    if constexpr (kOn && kWarpgroups > 1) {
      ptx::named_barrier_arrive(kFirst + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), kThreads);
    }
  }
};

}  // namespace fa
