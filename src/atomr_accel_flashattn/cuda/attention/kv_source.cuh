// SPDX-License-Identifier: Apache-2.0
// Where the producers of the FA3 family find K and V of a sequence: in tensors that hold the keys
// one after the other, or in a cache (cached_kv.cuh).
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "attention/sequence.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/layout.cuh"

namespace fa {

// L2 cache policies (PTX ISA, createpolicy): q is read once, k and v by many blocks.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

// Dense or packed tensors.
template <Config C, class P = Fa3FwdParams>
struct TensorKv {
  using Params = P;
  // The last key of a sequence is the last of its tensor, behind which TMA zero-fills.
  static constexpr bool kEndsWithTensor = !C.varlen;
  static constexpr bool kHasHoles = false;

  // What a lane knows of a tile before the tile may be loaded.
  struct Location {};

  const Sequence& seq;

  __device__ __forceinline__ TensorKv(const Params&, const Sequence& s, int) : seq(s) {}

  static __device__ __forceinline__ Sequence read_sequence(const Params& p, int batch) { return fa::read_sequence<C.varlen>(p.fwd, batch); }
  static __device__ __forceinline__ int splits(const Params&) { return 1; }

  __device__ __forceinline__ Location locate(int, const RowRange&) const { return {}; }

  // The whole warp; `leader` issues. `tiles`: the first stage.
  template <class Tile>
  __device__ __forceinline__ void load(const Location&, uint32_t tiles, int stage, const TensorMap* map, uint32_t barrier, int head_kv,
                                       int n, bool leader) const {
    if (!leader) return;
    ptx::mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
    Tile::load(tiles + stage * Tile::kBytes, map, barrier, seq.k_row + n * C.block_n, head_kv, seq.batch, kEvictLast);
  }
};

}  // namespace fa
