// SPDX-License-Identifier: Apache-2.0
// cp.async pipeline: shared-memory buffers that all threads of a block fill ahead of their use.
#pragma once

#include "ptx/cp_async.cuh"

namespace fa {

// kStages buffers of one of kOperands operands. A block produces and waits for its pipelines in
// turn, K V K V ...: the number of younger groups in flight is then the same at every wait, and a
// buffer that one operand released is filled again only after the wait of the other, whose barrier
// all warps have reached by then.
template <int kStages, int kStageBytes, int kOperands>
struct CpAsyncPipeline {
  const uint32_t buffers;
  int read = 0, write = 0;  // stages

  __device__ __forceinline__ explicit CpAsyncPipeline(uint32_t address) : buffers(address) {}

  // Producer: `fill` issues the copies of one tile to an address. With no tile left it issues none,
  // and the empty group keeps the count.
  template <class Fill>
  __device__ __forceinline__ void produce(Fill fill) {
    fill(buffers + write * kStageBytes);
    ptx::cp_async_commit();
    advance(write);
  }

  // Consumer: returns the oldest tile after the copies of all threads have landed. All warps have
  // then finished reading what they released before.
  __device__ __forceinline__ uint32_t consumer_wait() const {
    constexpr int kYounger = kOperands * (kStages - 1);
    ptx::cp_async_wait<kYounger>();
    __syncthreads();
    return buffers + read * kStageBytes;
  }

  // Consumer: this warp has read the oldest tile.
  __device__ __forceinline__ void consumer_release() { advance(read); }

 private:
  static __device__ __forceinline__ void advance(int& stage) {
    if constexpr (kStages > 1) stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

}  // namespace fa
