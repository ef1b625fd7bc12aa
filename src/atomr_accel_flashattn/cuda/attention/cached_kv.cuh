// SPDX-License-Identifier: Apache-2.0
// Where the producers of the FA3 family find K and V of a sequence (kv_source.cuh): in a cache, or
// in plain tensors whose keys are split.
#pragma once

#include "attention/kv_cache.cuh"
#include "attention/kv_source.cuh"

namespace fa {

// A cache: a slot of a contiguous one, where a tile is a box of block_n rows, or pages, of which a
// box is box_rows rows, the largest number that divides both block_n and a page. Boxes that no row
// of the block sees, and those of table entries outside the cache, have coordinates outside the
// tensor, so that TMA zero-fills them. With plain_kv the tensors are those of TensorKv.
template <Config C, class P = Fa3KvCacheParams>
struct CachedKv {
  using Params = P;
  // As of TensorKv. Behind the keys of a cache lie other slots.
  static constexpr bool kEndsWithTensor = C.plain_kv && !C.varlen;
  static constexpr bool kHasHoles = C.paged;  // keys of such entries are hidden one by one
  static constexpr int kChunk = 8;            // keys of a lane: the swizzle repeats every 8 rows
  static constexpr int kNowhere = -1;
  static_assert(C.block_n <= 32 * kChunk, "a lane knows eight keys");

  struct Location {
    int row, block;  // paged: where the box of this lane's keys begins
    uint32_t there;  // paged: bit i: keys 8 i .. 8 i + 7 are in the cache, or nobody sees them
  };

  const Params& p;
  const int32_t* table;  // paged: of this sequence
  int block, first_row;  // contiguous, and plain
  int box_begin;         // paged: first key of this lane's box, from that of the tile

  __device__ __forceinline__ CachedKv(const Params& params, const Sequence& seq, int batch) : p(params) {
    if constexpr (C.plain_kv) {
      block = seq.batch;
      first_row = static_cast<int>(seq.k_row);
    } else if constexpr (C.paged) {
      table = p.blocks + batch * p.table_stride;
      box_begin = lane() * kChunk / p.box_rows * p.box_rows;
    } else {
      block = p.blocks == nullptr ? batch : p.blocks[batch];
      first_row = p.left_pad == nullptr ? 0 : max(0, p.left_pad[batch]);
    }
  }

  // A row outside a contiguous cache has no keys.
  static __device__ __forceinline__ Sequence read_sequence(const Params& p, int batch) {
    Sequence seq = read_cached_sequence<C>(p, batch);
    if constexpr (!C.paged && !C.plain_kv) {
      const int block = p.blocks == nullptr ? batch : p.blocks[batch];
      if (block < 0 || block >= p.num_blocks) seq.length_k = 0;
    }
    return seq;
  }
  static __device__ __forceinline__ int splits(const Params& p) { return p.splits; }

  // The whole warp. `keys`: those that some row of the block sees; the table is read for no others.
  __device__ __forceinline__ Location locate(int n, const RowRange& keys) const {
    if constexpr (!C.paged) return {};
    const int first = n * C.block_n + box_begin, end = first + p.box_rows;
    const bool in_window = max(first, keys.begin) < min(end, keys.end);
    const bool seen = lane() * kChunk < C.block_n && (in_window || first < keys.sinks);
    const int page = first / p.block_size, entry = seen ? table[page] : kNowhere;
    const bool exists = entry >= 0 && entry < p.num_blocks;
    return {first - page * p.block_size, exists ? entry : kNowhere, __ballot_sync(0xffffffffu, exists || !seen)};
  }

  template <class Tile>
  __device__ __forceinline__ void load(const Location& at, uint32_t tiles, int stage, const TensorMap* map, uint32_t barrier, int head_kv,
                                       int n, bool leader) const {
    const uint32_t tile = tiles + stage * Tile::kBytes;
    if (leader) ptx::mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
    if constexpr (C.paged) {
#pragma unroll 1
      for (int box = 0; box < C.block_n; box += p.box_rows) {
        const int row = __shfl_sync(0xffffffffu, at.row, box / kChunk), page = __shfl_sync(0xffffffffu, at.block, box / kChunk);
        if (leader) Tile::load(tile + box * Tile::kRowBytes, map, barrier, row, head_kv, page, kEvictLast);
      }
    } else {
      if (leader) Tile::load(tile, map, barrier, first_row + n * C.block_n, head_kv, block, kEvictLast);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
};

}  // namespace fa
