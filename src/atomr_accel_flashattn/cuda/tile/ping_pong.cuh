// SPDX-License-Identifier: Apache-2.0
// Ping-pong barrier of the consumer warpgroups.
#pragma once

#include "ptx/named_barrier.cuh"

namespace fa {

// Ping-pong scheduling (FlashAttention-3, section 3.1): warpgroups issue their products in turn, so
// that one multiplies while the others compute their softmax. Every warpgroup takes its turn at
// every tile that the block visits, skipped ones included. Named barriers 8 and up are used.
template <bool kOn, int kWarpgroups>
struct PingPongBarrier {
  static constexpr int kFirst = 8, kThreads = 256;  // 128 that sync and 128 that arrive
  static constexpr bool kTakesTurns = kOn && kWarpgroups > 1;

  // The first warpgroup has the first turn.
  __device__ __forceinline__ void begin(int warpgroup) const {
    if constexpr (kTakesTurns) {
      if (warpgroup == kWarpgroups - 1) ptx::named_barrier_arrive(kFirst, kThreads);
    }
  }
  __device__ __forceinline__ void sync(int warpgroup) const {
    if constexpr (kTakesTurns) ptx::named_barrier_sync(kFirst + warpgroup, kThreads);
  }
  __device__ __forceinline__ void arrive_next(int warpgroup) const {
    if constexpr (kTakesTurns) {
      ptx::named_barrier_arrive(kFirst + (warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), kThreads);
    }
  }
};

}  // namespace fa
