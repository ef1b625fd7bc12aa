// SPDX-License-Identifier: Apache-2.0
// Persistent tile scheduler of the FA3 family: a block computes one work tile, or (persistent)
// takes one after the other from a counter that all blocks share.
#pragma once

#include "attention/scheduler.cuh"
#include "ptx/common.cuh"
#include "tile/tma_pipeline.cuh"
#include "tile/warp.cuh"

namespace fa {

// The producer warp of K takes tiles and broadcasts them to all other warps through a pipeline of
// two slots in shared memory. It alone decodes a tile, off the critical path: the integer divisions
// cost 600 clocks.
template <class Params, bool kPersistent, bool kSplit>
struct PersistentScheduler {
  static constexpr int kSlots = 2, kSlotBytes = 16;
  static constexpr int kBytes = kPersistent ? TmaPipeline<kSlots>::kBytes + kSlotBytes * kSlots : 0;

  const Params& p;
  uint32_t slots;
  TmaPipeline<kSlots> pipe;
  int taken = 0;

  static __device__ __forceinline__ void init(uint32_t address, int consumer_warps) {
    if constexpr (kPersistent) TmaPipeline<kSlots>::init(address, 1, consumer_warps);
  }
  __device__ __forceinline__ PersistentScheduler(const Params& params, uint32_t address)
      : p(params), slots(address + TmaPipeline<kSlots>::kBytes), pipe(address) {}

  __device__ __forceinline__ WorkTile first() const { return decode_split_tile<kSplit>(p, blockIdx.x); }

  // Producer: starts the atomic whose result broadcast_next() needs. Call once a tile, towards its
  // end: a block that prefetches early takes a long tile while still at a long one, and others run
  // out of work (8 % at head dim 256, causal, 8k rows).
  __device__ __forceinline__ void prefetch_next() {
    if constexpr (kPersistent) {
      if (threadIdx.x % 32 == 0) taken = atomicAdd(p.counters, 1);
    }
  }
  // Producer: decodes the tile taken and broadcasts it; one that is past_end() ends all roles.
  __device__ __forceinline__ WorkTile broadcast_next() {
    if constexpr (!kPersistent) return WorkTile::none();
    // Below 2^32: there are fewer than 2^31 tiles, and fewer than 2^31 blocks.
    const uint32_t tile = __shfl_sync(0xffffffffu, taken, 0) + gridDim.x;
    const WorkTile work = tile < static_cast<uint32_t>(p.tiles) ? decode_split_tile<kSplit>(p, tile) : WorkTile::none();
    pipe.producer_acquire();
    if (threadIdx.x % 32 == 0) {
      ptx::store_shared_16(slots + kSlotBytes * pipe.stage,
                           {static_cast<uint32_t>(work.block_m), static_cast<uint32_t>(work.head), static_cast<uint32_t>(work.batch),
                            static_cast<uint32_t>(kSplit ? work.split : 0)});
      ptx::mbarrier_arrive(pipe.full_barrier());
    }
    pipe.advance();
    return work;
  }
  // All other warps: get the next tile.
  __device__ __forceinline__ WorkTile get_next() {
    if constexpr (!kPersistent) return WorkTile::none();
    pipe.consumer_wait();
    __syncwarp();  // no lane may still poll the barrier when the slot is refilled (ABA)
    uint4 slot{};
    if (threadIdx.x % 32 == 0) {
      slot = ptx::load_shared_16(slots + kSlotBytes * pipe.stage);
      ptx::mbarrier_arrive(pipe.empty_barrier());
    }
    pipe.advance();
    return {uniform(static_cast<int>(slot.x)), uniform(static_cast<int>(slot.y)), uniform(static_cast<int>(slot.z)),
            kSplit ? uniform(static_cast<int>(slot.w)) : 0};
  }
  // Producer, at its end: the last block resets the counters for the next launch.
  __device__ __forceinline__ void reset_counters(bool leader) const {
    if constexpr (kPersistent) {
      __threadfence();  // orders the atomicAdd of prefetch_next(), by another lane, before this one
      if (leader && atomicAdd(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
        p.counters[0] = 0;
        p.counters[1] = 0;
      }
    }
  }
};

}  // namespace fa
