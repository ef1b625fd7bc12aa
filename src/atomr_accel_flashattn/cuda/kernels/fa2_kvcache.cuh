// SPDX-License-Identifier: Apache-2.0
// Forward attention of few queries over a cache of K and V with mma.sync: flash-decoding
// (https://crfm.stanford.edu/2023/10/12/flashdecoding.html) and what FlashAttention-2 needs beside
// it, for sm_80 and every later architecture.
//
// A block owns block_m rows of one KV head: the queries of all heads that read it, so that K and V
// are read once. Its warps are groups of block_m / 16, a warp of a group for 16 rows. The groups
// share the keys: each has a pipeline and a softmax of its own, waits for itself alone, and their
// states are merged at the end, as those of the splits are by another kernel.
//
// Batch-invariant kernels (docs/architecture.md says why the bits of a row are its own) differ in
// three things: tile n of the keys goes to group n % kGroups, wherever the block begins; rows do
// not look at each other; and nothing is split.
#pragma once

#include "attention/cache_operands.cuh"
#include "attention/descales.cuh"
#include "attention/epilogue.cuh"
#include "attention/kv_cache.cuh"
#include "attention/score_tile.cuh"
#include "attention/unowned_rows.cuh"
#include "ptx/named_barrier.cuh"

namespace fa {

template <Config C, class Descales = NoDescales<C>>
struct Fa2KvCache {
  static_assert(C.pack_gqa && C.any_ratio && !C.dropout && C.block_m % 16 == 0 && C.block_n <= 32, "tiles of few rows");
  static constexpr int kRowWarps = C.block_m / 16, kGroups = C.warps / kRowWarps, kGroupThreads = 32 * kRowWarps;
  static_assert(kGroups * kRowWarps == C.warps, "groups are equally large");
  static_assert(!C.batch_invariant || (kGroups == 4 && !C.split), "the order of sums");
  static constexpr int kStep = C.batch_invariant ? 1 : kGroups;  // what tile_at() counts
  static constexpr int kThreads = 32 * C.warps, kOutTiles = C.v_head_dim / 8;

  using Operands = CacheOperands<C>;
  using Traits = typename Operands::Traits;
  using Scores = ScoreTile<C, 1>;
  using TileQ = typename Operands::TileQ;
  using TileK = typename Operands::TileK;
  using TileV = typename Operands::TileV;
  template <int kCols>
  using Loader = CacheRowLoader<C.block_n, kCols, kGroupThreads, C.aligned, C.exact_head_dim, Operands::kElementBytes>;
  using LoaderK = Loader<C.head_dim>;
  using LoaderV = Loader<C.v_head_dim>;
  static constexpr int kStageBytes = TileK::kBytes + TileV::kBytes;

  const KvCacheParams& p;
  const FwdParams& f;
  const WorkTile work;  // its head is a KV head
  const Sequence seq;
  const Band<C> band;  // of the whole block
  const RowRange keys;
  const int group, thread;  // thread of the group
  const uint32_t sQ, stages;
  Scores tile;
  OnlineSoftmax<1, typename Operands::Range> softmax;
  float rO[1][kOutTiles][4];
  Descales descales;
  // Of each tile in flight: which keys there are, and their descales.
  uint32_t exists[C.stages];
  typename Descales::OfTile scales[C.stages];

  __device__ __forceinline__ Fa2KvCache(const KvCacheParams& params, const WorkTile& w, const Sequence& s, uint32_t shared,
                                        const Descales& factors = {})
      : p(params),
        f(params.fwd),
        work(w),
        seq(s),
        band(params.fwd, s, w.block_m * C.block_m, C.block_m),
        keys(band.keys()),
        group(warp_index() / kRowWarps),
        thread(static_cast<int>(threadIdx.x) % kGroupThreads),
        sQ(shared),
        stages(shared + Operands::kBytesOfQ + group * C.stages * kStageBytes),
        tile(params.fwd, w, s, w.block_m * C.block_m + warp_index() % kRowWarps * 16),
        descales(factors) {
    Scores::clear(rO);
    descales.begin(f, work, seq, tile.first_row);
  }

  __device__ __forceinline__ void run(int split) {
    if constexpr (C.batch_invariant) {
      if constexpr (!Operands::kConverts) load_q();
      const int sinks = sink_tile_count(band), tiles = max(0, band.tile_end() - band.tile_begin());
      mainloop(0, own_count(0, sinks) + own_count(band.tile_begin(), band.tile_end()), rounds(sinks) + rounds(tiles));
      merge_and_store(split);
    } else {
      const int64_t tiles = key_tile_count(band);
      run(static_cast<int>(tiles * split / p.splits), static_cast<int>(tiles * (split + 1) / p.splits), split);
    }
  }

  // Tiles [first, end), to partial result `part`; scheduled: -1 is o itself.
  __device__ __forceinline__ void run(int first, int end, int part) {
    if constexpr (!Operands::kConverts) load_q();  // lands while the first keys are on their way
    mainloop(first + group, end, rounds(max(0, end - first)));
    merge_and_store(part);
  }

 private:
  // Of the group that has most of so many tiles.
  static __device__ __forceinline__ int rounds(int tiles) { return (tiles + kGroups - 1) / kGroups; }

  __device__ __forceinline__ void merge_and_store(int part) {
    __syncthreads();  // all groups have read their last tiles, whose memory the merge takes
    store(part);
  }

  __device__ __forceinline__ void group_sync() const {
    if constexpr (kRowWarps == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier_sync(1 + group, kGroupThreads);
    }
  }

  // Rows of several heads: row r is query r / ratio of head r % ratio. Rows that do not exist are
  // zeros.
  __device__ __forceinline__ void load_q() const {
    const auto* q = static_cast<const uint16_t*>(f.q) + seq.batch * f.q_stride.batch + seq.q_row * f.q_stride.row;
    for (int copy = threadIdx.x; copy < C.block_m * TileQ::kChunks; copy += kThreads) {
      const int r = copy / TileQ::kChunks, chunk = copy - r * TileQ::kChunks, row = work.block_m * C.block_m + r;
      const bool valid = row < row_count<C>(f, seq);
      const int64_t at = valid ? query_of<C>(f, row) * f.q_stride.row + head_of<C>(f, work.head, row) * f.q_stride.head : 0;
      const uint16_t* from = q + at + 8 * chunk;
      if constexpr (C.aligned) {
        ptx::cp_async_16_or_zero(sQ + TileQ::offset(r, chunk), from, valid && (C.exact_head_dim || 8 * chunk < f.head_dim));
      } else {
        ptx::store_shared_16(sQ + TileQ::offset(r, chunk), gather(from, valid ? f.head_dim - 8 * chunk : 0));
      }
    }
    ptx::cp_async_commit();
  }

  // Every kStep-th tile from `i` on. Groups of several warps all make `most` rounds, with a tile or
  // without: racecheck misreports the merge where groups came to their barriers unequally often.
  __device__ __forceinline__ void mainloop(int i, int end, int most) {
    const int last = kRowWarps > 1 ? i + most * kStep : end;
    const KvCacheSource<C> source(p, seq, work.batch, work.head);
    int ahead = i;
    const auto fetch = [&](int stage) {
      if (ahead < end) load(stage, source, tile_at(ahead), stages + stage * kStageBytes);
      ptx::cp_async_commit();
      ahead += kStep;
    };
#pragma unroll
    for (int stage = 0; stage < C.stages; ++stage) fetch(stage);
    if constexpr (Operands::kConverts) {
      Operands::load_q(sQ, f, work, seq);
    } else {
      ptx::cp_async_wait<C.stages>();
    }
    __syncthreads();  // Q has landed, which all threads of the block copied
    if constexpr (Operands::kConverts) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        descales.multiply_row(r, Operands::row_factor(sQ, warp_index() % kRowWarps * 16 + Scores::lane_row() + 8 * r));
    }
    while (i < last) {
#pragma unroll
      for (int stage = 0; stage < C.stages; ++stage) {
        if (i >= last) break;
        ptx::cp_async_wait<C.stages - 1>();
        group_sync();  // the copies of all threads of the group have landed
        if (kRowWarps == 1 || i < end) compute(tile_at(i), stage, stages + stage * kStageBytes);
        group_sync();  // all warps of the group have read the tile
        fetch(stage);
        i += kStep;
      }
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ int tile_at(int i) const {
    if constexpr (C.batch_invariant) {
      const int sinks = own_count(0, sink_tile_count(band));
      return i < sinks ? group + i * kGroups : first_own(band.tile_begin()) + (i - sinks) * kGroups;
    }
    const int sinks = sink_tile_count(band);
    return i < sinks ? i : band.tile_begin() + i - sinks;
  }
  // Batch-invariant: of the tiles from `begin` on, the first of this group, and how many lie before
  // `end`.
  __device__ __forceinline__ int first_own(int begin) const { return begin + (group + kGroups - begin % kGroups) % kGroups; }
  __device__ __forceinline__ int own_count(int begin, int end) const { return max(0, (end - first_own(begin) + kGroups - 1) / kGroups); }

  // Starts the copies of tile n.
  __device__ __forceinline__ void load(int stage, const KvCacheSource<C>& source, int n, uint32_t shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32, key = n * C.block_n + lane;
    const bool valid = lane < C.block_n && keys.contains(key);
    const CachedKey at = source.locate(key, valid);
    const uint32_t there = __ballot_sync(0xffffffffu, valid && at.exists);
    LoaderK::load(shared, f.k, at.k, there, f.head_dim, thread);
    LoaderV::load(shared + TileK::kBytes, f.v, at.v, there, f.v_head_dim, thread);
    exists[stage] = there;
    scales[stage] = descales.load(n, at, there >> lane & 1);
  }

  // S = Q K^T, softmax, O += P V
  __device__ __forceinline__ void compute(int n, int stage, uint32_t shared) {
    typename Scores::Scores rS;
    Scores::clear(rS);
    const auto read_q = Operands::ReadQ::rows_then_chunks(sQ);
    const auto read_k = Operands::ReadK::chunks_then_rows(shared);
    const auto read_v = Operands::ReadV::rows_then_chunks(shared + TileK::kBytes);
    // Written out: as functions, the products of 16 bits come in another order of instructions.
    if constexpr (Operands::kConverts) {
      Operands::multiply_qk(rS, read_q, warp_index() % kRowWarps * 16, read_k);
    } else {
#pragma unroll
      for (int k = 0; k < C.head_dim / 16; ++k) {
        uint32_t a[4], b[4];
        read_q.read(a, warp_index() % kRowWarps * 16, k);
#pragma unroll
        for (int t = 0; t < Scores::kKeyTiles; t += 2) {
          read_k.read(b, 8 * t, k);
          Traits::mma(rS[0][t], a, b[0], b[1]);
          Traits::mma(rS[0][t + 1], a, b[2], b[3]);
        }
      }
    }
    descales.multiply_scores(rS, scales[stage]);
    tile.apply_scale_and_bias(rS, n);
    if (tile.band.needs_mask(n)) tile.apply_mask(rS, n);
    if (exists[stage] != kAllKeys) hide_absent(rS, exists[stage]);
    float rescale[1][2];
    if (update_softmax(rS, rescale)) {
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[0][t][e] *= rescale[0][e / 2];
    }
    if constexpr (Operands::kConverts) Operands::round_probabilities(rS);
    descales.multiply_probabilities(rS, rO, scales[stage]);
    if constexpr (Operands::kConverts) {
      Operands::multiply_pv(rO, rS, read_v);
    } else {
#pragma unroll
      for (int k = 0; k < Scores::kKeyTiles / 2; ++k) {
        uint32_t a[4], b[4];
        Scores::pack_probabilities(a, rS, 0, k);
#pragma unroll
        for (int t = 0; t < kOutTiles; t += 2) {
          read_v.read_transposed(b, 16 * k, t / 2);
          Traits::mma(rO[0][t], a, b[0], b[1]);
          Traits::mma(rO[0][t + 1], a, b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ bool update_softmax(typename Scores::Scores& rS, float (&rescale)[1][2]) {
    if constexpr (C.batch_invariant) return softmax.update_each_row(rS, rescale, tile.score.factor);
    return softmax.anywhere(
        softmax.template update<false>(rS, tile.row_bias, rescale, tile.score.factor, [this](int b, int r) { return tile.decides(b, r); }));
  }

  // A product that the compiler fuses with no sum, in one kernel and not in another.
  static __device__ __forceinline__ float product(float x, float y) {
    if constexpr (C.batch_invariant) return __fmul_rn(x, y);
    return x * y;
  }

  // Keys of blocks that the cache does not have.
  static constexpr uint32_t kAllKeys = C.block_n == 32 ? 0xffffffffu : (1u << C.block_n % 32) - 1;
  static __device__ __forceinline__ void hide_absent(typename Scores::Scores& rS, uint32_t there) {
#pragma unroll
    for (int t = 0; t < Scores::kKeyTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(there >> (8 * t + Scores::lane_col() + e % 2) & 1)) rS[0][t][e] = negative_infinity();
  }

  // Merges the groups. Each brings its maximum, then its sums relative to the largest one.
  __device__ __forceinline__ void store(int part) {
    const int lane_first_row = warp_index() % kRowWarps * 16 + Scores::lane_row();
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_reduce(softmax.sum[0][r], [](float x, float y) { return x + y; });
      if (Scores::lane_col() == 0) maxima()[group * C.block_m + lane_first_row + 8 * r] = product(softmax.max[0][r], tile.score.factor);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_first_row + 8 * r;
      const float top = largest(row), own = product(softmax.max[0][r], tile.score.factor);
      const float weight = own == negative_infinity() ? 0.f : softmax.without_offset(ptx::exp2(own - top));
      if (Scores::lane_col() == 0) sums()[group * C.block_m + row] = sum[r] * weight;
      float* o = outputs() + (group * C.block_m + row) * kPitch + Operands::kLaneCols * Scores::lane_col();
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          o[Operands::kPairsColumns ? 16 * (t / 2) + 2 * e + t % 2 : 8 * t + e] = descales.of_output(rO[0][t][2 * r + e] * weight);
    }
    __syncthreads();
    for (int chunk = threadIdx.x; chunk < C.block_m * kOutTiles; chunk += kThreads) store_chunk(part, chunk / kOutTiles, chunk % kOutTiles);
  }

  // Eight columns of a row.
  __device__ __forceinline__ void store_chunk(int part, int r, int chunk) const {
    const int row = work.block_m * C.block_m + r;
    if (row >= row_count<C>(f, seq)) return;
    const int query = query_of<C>(f, row), head = head_of<C>(f, work.head, row);
    float sum = 0.f, o[8] = {};
    for (int g = 0; g < kGroups; ++g) {
      sum += sums()[g * C.block_m + r];
      const float* part = outputs() + (g * C.block_m + r) * kPitch + 8 * chunk;
#pragma unroll
      for (int i = 0; i < 8; ++i) o[i] += part[i];
    }
    const bool partial = C.split || (C.scheduled && part >= 0);
    const float sink = !C.learned_sink ? 0.f : partial ? negative_infinity() : product(f.learned_sink[head], kLog2e);
    const RowResult end = finalize_row<C>(sum, largest(r), sink);
    const int64_t lse_row = work.batch * f.lse_batch_stride + head * f.lse_head_stride + seq.q_row + query;
    if (partial) {
      const int64_t at = C.scheduled ? int64_t{part} * C.block_m + r : part * p.lse_rows + lse_row;
      if (chunk == 0) p.partial_sum[at] = {largest(r), sum};
      if (8 * chunk >= f.v_head_dim) return;
      auto* target = reinterpret_cast<float4*>(p.partial_o + at * (C.scheduled ? C.v_head_dim : f.v_head_dim) + 8 * chunk);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        target[i] = {o[4 * i] * end.scale, o[4 * i + 1] * end.scale, o[4 * i + 2] * end.scale, o[4 * i + 3] * end.scale};
    } else {
      if (f.lse != nullptr && chunk == 0) f.lse[lse_row] = end.lse;
      auto* out = static_cast<Bits<C.out_dtype>*>(f.o) + seq.batch * f.o_stride.batch + (seq.q_row + query) * f.o_stride.row +
                  head * f.o_stride.head;
#pragma unroll
      for (int i = 0; i < 4; ++i) store_two<C>(out, 8 * chunk + 2 * i, f.v_head_dim, o[2 * i] * end.scale, o[2 * i + 1] * end.scale);
    }
  }

  // The merge, in the memory of the stages: maxima and sums of each group and row, then their o.
  static constexpr int kPitch = C.v_head_dim + 4;  // floats of a row: rows begin in different banks
  static __device__ __forceinline__ float* merge_memory() {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<float*>(shared + Operands::kBytesOfQ);
  }
  static __device__ __forceinline__ float* maxima() { return merge_memory(); }
  static __device__ __forceinline__ float* sums() { return merge_memory() + kGroups * C.block_m; }
  static __device__ __forceinline__ float* outputs() { return merge_memory() + 2 * kGroups * C.block_m; }
  static __device__ __forceinline__ float largest(int row) {
    float top = negative_infinity();
    for (int g = 0; g < kGroups; ++g) top = fmaxf(top, maxima()[g * C.block_m + row]);
    return top;
  }
};

// Blocks are (sequence, KV head, rows, split), splits side by side.
template <Config C, class Descales = NoDescales<C>>
__device__ __forceinline__ void fa2_kvcache(const KvCacheParams& p, const Descales& descales = {}) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int split = blockIdx.x % p.splits, rest = blockIdx.x / p.splits;
  const int block_m = rest % p.fwd.blocks_m, pair = rest / p.fwd.blocks_m;
  const int batch = pair / p.fwd.work_heads, head = pair - batch * p.fwd.work_heads;
  if (C.varlen && !C.split && batch == p.fwd.batch - 1) {
    const int tiles = p.fwd.blocks_m * p.fwd.work_heads;  // of this sequence
    write_unowned_rows<C>(p.fwd, block_m * p.fwd.work_heads + head, tiles, threadIdx.x, Fa2KvCache<C>::kThreads);
  }
  const Sequence seq = read_cached_sequence<C>(p, batch);
  if (block_m * C.block_m < row_count<C>(p.fwd, seq))
    Fa2KvCache<C, Descales>(p, {block_m, head, batch}, seq, ptx::shared_address(shared), descales).run(split);
}

}  // namespace fa
