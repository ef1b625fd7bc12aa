// Which tiles a block of the FA3 family computes: one, or one after the other from a counter that all blocks share (persistent).
#pragma once

#include "attention/scheduler.cuh"
#include "ptx/common.cuh"
#include "tile/tma_pipeline.cuh"
#include "tile/warp.cuh"

namespace fa {

// The first loading warp takes tiles and hands them to all other warps at work through a ring of two slots in shared memory. A tile is decoded
// once, by that warp, which has the time: its integer divisions cost 600 clocks.
template <bool kPersistent>
struct TileStream {
  static constexpr int kSlots = 2, kSlotBytes = 16;
  static constexpr int kBytes = kPersistent ? Ring<kSlots>::kBytes + kSlotBytes * kSlots : 0;

  const Fa3FwdParams& p;
  uint32_t slots;
  Ring<kSlots> ring;
  int taken = 0;

  static __device__ __forceinline__ void init(uint32_t address, int reading_warps) {
    if constexpr (kPersistent) Ring<kSlots>::init(address, 1, reading_warps);
  }
  __device__ __forceinline__ TileStream(const Fa3FwdParams& params, uint32_t address)
      : p(params), slots(address + Ring<kSlots>::kBytes), ring(address) {}

  __device__ __forceinline__ Work first() const { return decode_work(p.fwd, blockIdx.x); }

  // Loading warp: asks for the next tile, which is needed only at hand_out(). To be called once a tile, towards its end: blocks that ask early are
  // given long tiles while they are still at long ones, and others run out of work (8 % at head dim 256, causal, 8k rows).
  __device__ __forceinline__ void take() {
    if constexpr (kPersistent) {
      if (threadIdx.x % 32 == 0) taken = atomicAdd(p.counters, 1);
    }
  }
  // Loading warp: decodes the tile that was taken and hands it to the other warps; one that is over() ends the work.
  __device__ __forceinline__ Work hand_out() {
    if constexpr (!kPersistent) return Work::none();
    const uint32_t tile = __shfl_sync(0xffffffffu, taken, 0) + gridDim.x;  // below 2^32, as there are fewer than 2^31 tiles and blocks
    const Work work = tile < static_cast<uint32_t>(p.tiles) ? decode_work(p.fwd, tile) : Work::none();
    ring.wait_empty();
    if (threadIdx.x % 32 == 0) {
      ptx::store_shared_16(slots + kSlotBytes * ring.stage,
                           {static_cast<uint32_t>(work.block_m), static_cast<uint32_t>(work.head), static_cast<uint32_t>(work.batch), 0});
      ptx::barrier_arrive(ring.full());
    }
    ring.advance();
    return work;
  }
  // All other warps: the next tile.
  __device__ __forceinline__ Work next() {
    if constexpr (!kPersistent) return Work::none();
    ring.wait_full();
    __syncwarp();  // no lane may look at the barrier once the slot is filled anew
    uint4 slot{};
    if (threadIdx.x % 32 == 0) {
      slot = ptx::load_shared_16(slots + kSlotBytes * ring.stage);
      ptx::barrier_arrive(ring.empty());
    }
    ring.advance();
    return {uniform(static_cast<int>(slot.x)), uniform(static_cast<int>(slot.y)), uniform(static_cast<int>(slot.z))};
  }
  // Loading warp, at its end: the last block leaves the counters as it found them.
  __device__ __forceinline__ void finish(bool leader) const {
    if constexpr (kPersistent) {
      __threadfence();  // after what take() of another lane added
      if (leader && atomicAdd(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
        p.counters[0] = 0;
        p.counters[1] = 0;
      }
    }
  }
};

}  // namespace fa
