// SPDX-License-Identifier: Apache-2.0
// Where the keys of a sequence lie in a cache: in one slot of it, or in the pages of a table.
#pragma once

#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "attention/sequence.cuh"
#include "ptx/common.cuh"
#include "ptx/cp_async.cuh"
#include "tile/loader.cuh"

namespace fa {

// Sets the error word where the lengths, the padding or the row of a sequence do not fit.
template <Config C>
__device__ __forceinline__ void check_cached_sequence(const KvCacheParams& p, int batch, int before, int64_t used, int pad) {
  bool fits = before >= 0 && used <= p.capacity && pad >= 0 && pad <= before;
  if (!C.paged && p.blocks != nullptr) fits &= p.blocks[batch] >= 0 && p.blocks[batch] < p.num_blocks;
  if (!fits) atomicMax(p.error, batch + 1);
}

// Tokens of a sequence before a call, and with its new ones: in 64 bits, as no length on a GPU has
// been looked at.
struct CachedLength {
  int before;
  int64_t used;
  __device__ __forceinline__ CachedLength(const KvCacheParams& p, int batch) : used(p.new_tokens) {
    if (p.cu_seqlens_new != nullptr) used = p.cu_seqlens_new[batch + 1] - p.cu_seqlens_new[batch];
    before = p.cache_lengths != nullptr ? p.cache_lengths[batch] : p.fwd.cu_seqlens_k[batch + 1] - p.fwd.cu_seqlens_k[batch];
    used += before;
  }
};

// Rows of q are dense or packed.
template <Config C>
__device__ __forceinline__ Sequence rows_of_sequence(const FwdParams& p, int batch, int keys) {
  if constexpr (C.varlen) {
    const int row = p.cu_seqlens_q[batch];
    return {p.cu_seqlens_q[batch + 1] - row, keys, row, 0, 0};
  } else {
    return {p.seqlen_q, keys, 0, 0, batch};
  }
}

// There are never more keys than fit. With a StepPlan, finish_idle (step_kvcache.cuh) checks all
// sequences once.
template <Config C>
__device__ __forceinline__ Sequence read_cached_sequence(const KvCacheParams& p, int batch) {
  if constexpr (C.plain_kv) return read_sequence<C.varlen>(p.fwd, batch);
  const CachedLength length(p, batch);
  const int given = p.left_pad == nullptr ? 0 : p.left_pad[batch], pad = max(0, given);
  if (!C.scheduled && threadIdx.x == 0 && p.error != nullptr) check_cached_sequence<C>(p, batch, length.before, length.used, given);
  return rows_of_sequence<C>(p.fwd, batch, static_cast<int>(max(int64_t{0}, min(length.used, int64_t{p.capacity}) - pad)));
}

// Tiles of keys that some row of a band sees: those of sink tokens below the window, then the
// window's.
template <Config C>
__device__ __forceinline__ int sink_tile_count(const Band<C>& band) {
  return C.sink_tokens ? min((band.keys().sinks + C.block_n - 1) / C.block_n, band.tile_begin()) : 0;
}
template <Config C>
__device__ __forceinline__ int key_tile_count(const Band<C>& band) {
  return sink_tile_count(band) + max(0, band.tile_end() - band.tile_begin());
}

// Elements from the beginning of K and of V to a key's row.
struct CachedKey {
  int64_t k, v;
  bool exists;     // a table entry outside the cache names no keys
  int block, row;  // of the cache
};

template <Config C>
struct KvCacheSource {
  const KvCacheParams& p;
  const int32_t* table;  // paged: of this sequence
  int first_slot;        // of its first key: left padding
  int64_t k_base, v_base;
  bool in_cache = true;  // contiguous: whether there is such a block

  __device__ __forceinline__ KvCacheSource(const KvCacheParams& params, const Sequence& seq, int batch, int head_kv)
      : p(params),
        table(C.paged ? params.blocks + batch * params.table_stride : nullptr),
        first_slot(params.left_pad == nullptr ? 0 : max(0, params.left_pad[batch])),
        k_base(head_kv * params.fwd.k_stride.head),
        v_base(head_kv * params.fwd.v_stride.head) {
    if constexpr (C.plain_kv) {
      k_base += seq.batch * params.fwd.k_stride.batch + seq.k_row * params.fwd.k_stride.row;
      v_base += seq.batch * params.fwd.v_stride.batch + seq.k_row * params.fwd.v_stride.row;
    } else if constexpr (!C.paged) {
      const int64_t block = params.blocks == nullptr ? batch : params.blocks[batch];
      k_base += block * params.fwd.k_stride.batch;
      v_base += block * params.fwd.v_stride.batch;
      in_cache = block >= 0 && block < params.num_blocks;
    }
  }

  // `valid`: some row sees the key. The table is read for such keys only.
  __device__ __forceinline__ CachedKey locate(int key, bool valid) const {
    const FwdParams& f = p.fwd;
    const int slot = first_slot + key;
    if constexpr (C.paged) {
      const int page = slot / p.block_size, row = slot - page * p.block_size;
      const int block = valid ? table[page] : -1;
      const bool exists = block >= 0 && block < p.num_blocks;
      const int64_t at = exists ? block : 0;
      return {k_base + at * f.k_stride.batch + row * f.k_stride.row, v_base + at * f.v_stride.batch + row * f.v_stride.row, exists,
              static_cast<int>(at), row};
    } else {
      return {k_base + slot * f.k_stride.row, v_base + slot * f.v_stride.row, in_cache, 0, slot};
    }
  }
};

// Loads kRows rows of kCols elements with kThreads threads. Row r begins `offset` elements after
// `base`, as lane r of every warp knows it, and is zero-filled where its bit of `exists` is not
// set; so are columns from `cols` on.
template <int kRows, int kCols, int kThreads, bool kAligned, bool kExactCols, int kElementBytes = 2>
struct ScatteredRowLoader {
  static_assert(kRows <= 32, "a lane knows a row");
  using Element = typename BitsOf<kElementBytes>::Type;
  using Tile = SharedTile<kRows, kCols * kElementBytes / 2>;
  static constexpr int kOfChunk = 16 / kElementBytes;
  static constexpr int kCopies = kRows * Tile::kChunks;

  static __device__ __forceinline__ void load(uint32_t tile, const void* base, int64_t offset, uint32_t exists, int cols, int thread) {
#pragma unroll 4
    for (int first = 0; first < kCopies; first += kThreads) {
      const int copy = first + thread, row = copy / Tile::kChunks, chunk = copy - row * Tile::kChunks;
      const int64_t at = __shfl_sync(0xffffffffu, offset, row % 32);
      if (kCopies % kThreads != 0 && copy >= kCopies) continue;
      const Element* from = static_cast<const Element*>(base) + at + kOfChunk * chunk;
      const bool valid = exists >> row & 1;
      if constexpr (kAligned) {
        ptx::cp_async_16_or_zero(tile + Tile::offset(row, chunk), from, valid && (kExactCols || kOfChunk * chunk < cols));
      } else {
        ptx::store_shared_16(tile + Tile::offset(row, chunk), gather(from, valid ? cols - kOfChunk * chunk : 0));
      }
    }
  }
};

// The same of 8-bit elements by one warp whose lanes have a column of chunks each: nothing but the
// offset of a row is computed for a copy.
template <int kRows, int kCols, bool kAligned, bool kExactCols>
struct ByteRowLoader {
  using Tile = SharedTile<kRows, kCols / 2>;
  static constexpr int kRowsPerPass = 32 / Tile::kChunks;
  static_assert(32 % Tile::kChunks == 0 && kRows % kRowsPerPass == 0 && kAligned, "whole rows a pass");

  static __device__ __forceinline__ void load(uint32_t tile, const void* base, int64_t offset, uint32_t exists, int cols, int thread) {
    const uint32_t first = static_cast<uint32_t>(thread) / Tile::kChunks, chunk = static_cast<uint32_t>(thread) % Tile::kChunks;
    const uint8_t* from = static_cast<const uint8_t*>(base) + 16 * chunk;
    const bool in_row = kExactCols || static_cast<int>(16 * chunk) < cols;
    const uint32_t own = in_row ? exists >> first : 0;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsPerPass) {
      const int64_t at = __shfl_sync(0xffffffffu, offset, row + first);
      ptx::cp_async_16_or_zero(tile + Tile::offset(row + first, chunk), from + at, own >> row & 1);
    }
  }
};

// Which of them.
template <int kRows, int kCols, int kThreads, bool kAligned, bool kExactCols, int kElementBytes>
struct LoaderOf {
  using Type = ScatteredRowLoader<kRows, kCols, kThreads, kAligned, kExactCols, kElementBytes>;
};
template <int kRows, int kCols, bool kExactCols>
  requires(512 % kCols == 0)
struct LoaderOf<kRows, kCols, 32, true, kExactCols, 1> {
  using Type = ByteRowLoader<kRows, kCols, true, kExactCols>;
};
template <int kRows, int kCols, int kThreads, bool kAligned, bool kExactCols, int kElementBytes>
using CacheRowLoader = typename LoaderOf<kRows, kCols, kThreads, kAligned, kExactCols, kElementBytes>::Type;

}  // namespace fa
