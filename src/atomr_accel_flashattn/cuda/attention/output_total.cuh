// SPDX-License-Identifier: Apache-2.0
// Two-level accumulation of O for fp8, whose wgmma keeps 14 bits of an accumulator and truncates:
// beside a sum of thousands of keys, what a few more add is lost.
#pragma once

#include "attention/config.cuh"
#include "ptx/local.cuh"

namespace fa {

// Every C.flush_tiles tiles of keys, O is added to a float32 total and starts again from zero. The
// total lies in local memory: registers for it would cost tiles half of their keys, and it is
// touched once in some thousand keys.
template <Config C, bool kOn = (C.flush_tiles > 0)>
struct OutputTotal {
  struct Memory {};
  using Output = float[C.v_head_dim / 8][4];
  __device__ __forceinline__ explicit OutputTotal(Memory&) {}
  __device__ __forceinline__ bool due() { return false; }
  __device__ __forceinline__ void rescale(const float (&)[2]) {}
  __device__ __forceinline__ void flush(Output&) {}
  __device__ __forceinline__ void add_to(Output&) const {}
};

template <Config C>
struct OutputTotal<C, true> {
  static constexpr int kTiles = C.v_head_dim / 8;
  using Output = float[kTiles][4];
  struct __align__(16) Memory {
    float total[4 * kTiles];
  };

  uint64_t address;
  int tiles = 0;                // of keys so far
  float scale[2] = {0.f, 0.f};  // of the total, by the row of the lane

  __device__ __forceinline__ explicit OutputTotal(Memory& memory) : address(ptx::local_address(&memory)) {}

  // Once a tile: whether flush() is.
  __device__ __forceinline__ bool due() { return ++tiles % C.flush_tiles == 0; }

  // The reference maxima rose by these factors of O.
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    scale[0] *= factor[0];
    scale[1] *= factor[1];
  }

  __device__ __forceinline__ void flush(Output& rO) {
    const bool first = tiles == C.flush_tiles;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (!first) add(rO[t], t);
      ptx::store_local_16(address + 16 * t, rO[t]);
#pragma unroll
      for (int e = 0; e < 4; ++e) rO[t][e] = 0.f;
    }
    scale[0] = scale[1] = 1.f;
  }

  // At the end: what was flushed comes back.
  __device__ __forceinline__ void add_to(Output& rO) const {
    if (tiles < C.flush_tiles) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) add(rO[t], t);
  }

 private:
  __device__ __forceinline__ void add(float (&rO)[4], int t) const {
    float total[4];
    ptx::load_local_16(total, address + 16 * t);
#pragma unroll
    for (int e = 0; e < 4; ++e) rO[e] = fmaf(total[e], scale[e / 2], rO[e]);
  }
};

}  // namespace fa
