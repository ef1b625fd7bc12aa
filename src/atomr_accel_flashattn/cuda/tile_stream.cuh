// Which tiles a block of the FA3 family computes: one, or one after the other from a counter that all blocks share (persistent).
#pragma once

#include "pipeline.cuh"

namespace fa {

// The loading warp takes tiles and hands their numbers to the computing warps through a ring of two words in shared memory.
template <bool kPersistent>
struct TileStream {
  static constexpr int kSlots = 2;
  static constexpr int kBytes = kPersistent ? Ring<kSlots>::kBytes + 4 * kSlots : 0;

  const Fa3FwdParams& p;
  uint32_t slots;
  Ring<kSlots> ring;
  int taken = 0;

  static __device__ __forceinline__ void init(uint32_t address, int reading_warps) {
    if constexpr (kPersistent) Ring<kSlots>::init(address, 1, reading_warps);
  }
  __device__ __forceinline__ TileStream(const Fa3FwdParams& params, uint32_t address)
      : p(params), slots(address + Ring<kSlots>::kBytes), ring(address) {}

  static __device__ __forceinline__ int first() { return blockIdx.x; }

  // Loading warp: asks for the next tile; its number is needed only at hand_out().
  __device__ __forceinline__ void take(bool leader) {
    if constexpr (kPersistent) {
      if (leader) taken = min(atomicAdd(p.counters, 1) + gridDim.x, 0x7fffffffu);  // past the last tile, never negative
    }
  }
  // Loading warp: hands the taken tile to the computing warps, and gives its number; p.tiles or more ends the work.
  __device__ __forceinline__ int hand_out(bool leader) {
    if constexpr (!kPersistent) return p.tiles;
    ring.wait_empty();
    if (leader) {
      ptx::store_shared_4(slots + 4 * ring.stage, taken);
      ptx::barrier_arrive(ring.full());
    }
    ring.wait_full();
    const int tile = ptx::load_shared_4(slots + 4 * ring.stage);
    ring.advance();
    return __shfl_sync(0xffffffffu, tile, 0);
  }
  // Computing warps: the next tile.
  __device__ __forceinline__ int next() {
    if constexpr (!kPersistent) return p.tiles;
    ring.wait_full();
    const int tile = ptx::load_shared_4(slots + 4 * ring.stage);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(ring.empty());
    ring.advance();
    return __shfl_sync(0xffffffffu, tile, 0);
  }
  // Loading warp, at its end: the last block leaves the counters as it found them.
  __device__ __forceinline__ void finish(bool leader) const {
    if constexpr (kPersistent) {
      if (leader && atomicAdd(p.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
        p.counters[0] = 0;
        p.counters[1] = 0;
      }
    }
  }
};

}  // namespace fa
