// Rings of shared-memory buffers between the warps that load and the warpgroups that compute. Stage and phase stay in here.
#pragma once

#include "ptx/mbarrier.cuh"

namespace fa {

// Two mbarriers a stage: `full` ends a phase when the bytes have landed, `empty` when every reader has let go.
template <int kStages>
struct Ring {
  static constexpr int kBytes = kStages * 16;
  uint32_t barriers;
  int stage = 0, phase = 0;

  static __device__ __forceinline__ void init(uint32_t barriers, int writers, int readers) {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(barriers + 16 * i, writers);
      ptx::barrier_init(barriers + 16 * i + 8, readers);
    }
  }
  __device__ __forceinline__ explicit Ring(uint32_t address) : barriers(address) {}

  // The ring that lies `i` rings further and is at the same stage and phase.
  __device__ __forceinline__ Ring neighbour(int i) const {
    Ring ring = *this;
    ring.barriers += i * kBytes;
    return ring;
  }

  __device__ __forceinline__ uint32_t full() const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }

  // Writer, a whole warp: returns when the stage may be overwritten. A fresh barrier counts as released. No lane may fill the stage while
  // another still looks at `empty`: once readers let go again it is two phases on, which looks like one that has not moved.
  __device__ __forceinline__ void wait_empty() const {
    ptx::barrier_wait(empty(), phase ^ 1);
    __syncwarp();
  }
  // Reader: returns when the stage is filled.
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full(), phase); }

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fa
