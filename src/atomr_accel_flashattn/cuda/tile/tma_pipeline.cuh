// SPDX-License-Identifier: Apache-2.0
// Pipelines between TMA producer warps and consumer warpgroups. Stage and phase stay in here.
#pragma once

#include "ptx/mbarrier.cuh"

namespace fa {

// A ring of kStages buffers, with two mbarriers each: `full` completes a phase when the bytes have
// arrived, `empty` when every consumer has released the stage.
template <int kStages>
struct TmaPipeline {
  static constexpr int kBytes = kStages * 16;
  uint32_t barriers;
  int stage = 0, phase = 0;

  static __device__ __forceinline__ void init(uint32_t barriers, int producers, int consumers) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barriers + 16 * i, producers);
      ptx::mbarrier_init(barriers + 16 * i + 8, consumers);
    }
  }
  __device__ __forceinline__ explicit TmaPipeline(uint32_t address) : barriers(address) {}

  // The pipeline `i` places further in shared memory, at the same stage and phase.
  __device__ __forceinline__ TmaPipeline neighbour(int i) const {
    TmaPipeline pipe = *this;
    pipe.barriers += i * kBytes;
    return pipe;
  }

  __device__ __forceinline__ uint32_t full_barrier() const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return full_barrier() + 8; }

  // Producer, a whole warp: waits until the stage may be overwritten; a fresh barrier counts as
  // released. No lane may fill the stage while another still polls `empty`: after the next release
  // the parity has flipped twice (ABA), which looks like no release.
  __device__ __forceinline__ void producer_acquire() const {
    ptx::mbarrier_wait(empty_barrier(), phase ^ 1);
    __syncwarp();
  }
  // Consumer: waits until the stage is filled.
  __device__ __forceinline__ void consumer_wait() const { ptx::mbarrier_wait(full_barrier(), phase); }

  // Consumer, a whole warpgroup: one thread arrives for all. wgmma_wait has completed the reads of
  // every thread by then.
  __device__ __forceinline__ void consumer_release() {
    if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty_barrier());
    advance();
  }

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fa
