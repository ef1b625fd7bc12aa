// SPDX-License-Identifier: Apache-2.0
// Dropout pattern from Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy
// as 1, 2, 3, SC 2011). Counter words and byte map: docs/semantics.md, Dropout.
#pragma once

#include "ptx/types.cuh"

namespace fa {

struct Philox {
  uint32_t key0, key1, offset;

  __device__ __forceinline__ explicit Philox(const int64_t* rng) {
    const uint64_t seed = static_cast<uint64_t>(rng[0]), skip = static_cast<uint64_t>(rng[1]);
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(skip >> 32);
    offset = static_cast<uint32_t>(skip);
  }

  __device__ __forceinline__ uint4 operator()(uint32_t c0, uint32_t c1, uint32_t c2) const {
    uint4 c = {c0, c1, c2, offset};
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c.x, b = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
      c = {static_cast<uint32_t>(b >> 32) ^ c.y ^ k0, static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ c.w ^ k1,
           static_cast<uint32_t>(a)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
};

// The 16 bytes of one call cover rows i and i ^ 8 and, per row, 8 keys of a 32-key group.
struct DropoutBytes {
  uint4 words;
  // `upper`: the row with bit 3 set; `tile`: (j >> 3) & 3; `odd`: j & 1.
  __device__ __forceinline__ uint32_t at(int upper, int tile, int odd) const {
    const uint32_t word = upper ? (tile & 2 ? words.w : words.z) : (tile & 2 ? words.y : words.x);
    return (word >> (8 * ((tile & 1) * 2 + odd))) & 0xffu;
  }
};

}  // namespace fa
