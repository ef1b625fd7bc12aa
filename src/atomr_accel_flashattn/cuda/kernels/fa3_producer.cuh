// SPDX-License-Identifier: Apache-2.0
// The FA3 family: what the roles of a block share, and its producer warps, which load tiles of Q, K
// and V by TMA.
#pragma once

#include "attention/block_band.cuh"
#include "attention/kv_source.cuh"
#include "attention/persistent_scheduler.cuh"
#include "attention/value_operand.cuh"
#include "ptx/tma.cuh"
#include "tile/mma_traits.cuh"
#include "tile/swizzled_tile.cuh"
#include "tile/tma_pipeline.cuh"

namespace fa {

// `Source` says where K and V are (attention/kv_source.cuh).
template <Config C, class Source = TensorKv<C>>
struct Fa3Producer {
  static constexpr int kConsumers = C.warps / 4 - 1;
  static constexpr int kWarpgroupRows = 64;
  static_assert(C.block_m == kConsumers * kWarpgroupRows, "a consumer warpgroup has 64 rows");
  static_assert(C.aligned, "TMA needs 16-byte strides");
  static_assert(!C.pack_gqa || !(C.alibi || C.dropout), "slopes and the generator's counter differ between the heads of a tile");

  using TileQ = SwizzledTile<kWarpgroupRows, C.head_dim, bytes_of(C.dtype)>;  // of one warpgroup
  using TileK = SwizzledTile<C.block_n, C.head_dim, bytes_of(C.k_dtype)>;
  using Values = ValueOperand<C>;
  using TileV = typename Values::Tile;
  using LoadedV = typename Values::Loaded;
  static constexpr bool kTransposesV = Values::kRawStages > 0;
  using Params = typename Source::Params;
  using Scheduler = PersistentScheduler<Params, C.persistent, C.split>;

  // Offsets in shared memory, from an address aligned to 1024 bytes, the period of the swizzle.
  static constexpr int kQ = 0, kK = kQ + kConsumers * TileQ::kBytes, kV = kK + C.stages * TileK::kBytes,
                       kLoadedV = kV + (C.stages * TileV::kBytes + 1023) / 1024 * 1024,
                       kBarriersQ = kLoadedV + Values::kRawStages * LoadedV::kBytes;
  static_assert(kK % 1024 == 0 && kV % 1024 == 0 && kLoadedV % 1024 == 0, "first stages begin on the longest period");
  static constexpr int kBarriersK = kBarriersQ + kConsumers * TmaPipeline<1>::kBytes,
                       kBarriersV = kBarriersK + TmaPipeline<C.stages>::kBytes;
  static constexpr int kZeroFill = kBarriersV + TmaPipeline<C.stages>::kBytes, kScheduler = kZeroFill + TmaPipeline<1>::kBytes;
  static constexpr int kThere = kScheduler + Scheduler::kBytes;  // a word for each stage of K
  static constexpr int kBarriersLoadedV = (kThere + (Source::kHasHoles ? 4 * C.stages : 0) + 7) / 8 * 8;
  using PipeLoadedV = TmaPipeline<kTransposesV ? Values::kRawStages : 1>;
  static_assert(kBarriersLoadedV + (kTransposesV ? PipeLoadedV::kBytes : 0) <= kBarriersQ + 512,
                "kernels/fa3_fwd.py leaves 512 bytes for barriers");

  // Registers per thread after setmaxnreg, which moves them from the producer warpgroup to the
  // consumers; 64 Ki in all.
  static constexpr bool kSpares = kConsumers == 2 && kTransposesV && !C.lean_producer;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kSpares ? 40 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? (kSpares ? 232 : 240) : kConsumers == 3 ? 160 : 112;

  // Every row sees every key that the tensor has.
  static constexpr bool kUnmasked = Source::kEndsWithTensor && !C.left_bound && !C.right_bound;

  const Params& p;
  const uint32_t shared;
  TmaPipeline<1> pipe_q;
  TmaPipeline<C.stages> pipe_k, pipe_v;
  PipeLoadedV pipe_loaded_v;
  Scheduler scheduler;
  int zero_fill_phase = 0;

  // `warpgroup`: index among the consumers; unused by producers.
  __device__ __forceinline__ Fa3Producer(const Params& params, uint32_t address, int warpgroup)
      : p(params),
        shared(address),
        pipe_q(address + kBarriersQ + warpgroup * TmaPipeline<1>::kBytes),
        pipe_k(address + kBarriersK),
        pipe_v(address + kBarriersV),
        pipe_loaded_v(address + kBarriersLoadedV),
        scheduler(params, address + kScheduler) {}

  static __device__ __forceinline__ void init_barriers(uint32_t shared) {
    for (int w = 0; w < kConsumers; ++w) TmaPipeline<1>::init(shared + kBarriersQ + w * TmaPipeline<1>::kBytes, 1, 1);
    TmaPipeline<C.stages>::init(shared + kBarriersK, 1, kConsumers);
    TmaPipeline<C.stages>::init(shared + kBarriersV, Values::kWarps, kConsumers);
    if constexpr (kTransposesV) PipeLoadedV::init(shared + kBarriersLoadedV, 1, Values::kWarps);
    ptx::mbarrier_init(shared + kZeroFill, 1);
    Scheduler::init(shared + kScheduler, 4 * kConsumers + (kTransposesV ? 0 : 1) + Values::kWarps);
    ptx::mbarrier_init_fence();
  }

  // Producer warp of K, which also runs the tile scheduler. Where the others transpose V, it loads
  // V and Q as well. Control flow is uniform over the warp; one elected lane issues.
  __device__ __forceinline__ void produce_k() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tma_prefetch_map(&p.k_map);
    if (kTransposesV && leader) {
      ptx::tma_prefetch_map(&p.v_map);
      ptx::tma_prefetch_map(&p.q_map);
    }
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.broadcast_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      const BlockBand<C> band = block_band(work, seq, work.block_m * C.block_m);
      const Source source(p, seq, work.batch);
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
      int n = first_tile(work, seq, band);
      if (n < 0) scheduler.prefetch_next();
      bool q_is_due = kTransposesV;
#pragma unroll 1
      for (int next; n >= 0; n = next) {
        next = band.next_tile(n);
        if (next < 0) scheduler.prefetch_next();  // its latency hides behind the wait below
        const auto at = source.locate(n, band.keys());
        pipe_k.producer_acquire();
        if constexpr (Source::kHasHoles) {
          if (leader) ptx::store_shared_4(shared + kThere + 4 * pipe_k.stage, at.there);
        }
        source.template load<TileK>(at, shared + kK, pipe_k.stage, &p.k_map, pipe_k.full_barrier(), head_kv, n, leader);
        pipe_k.advance();
        if constexpr (kTransposesV) {
          pipe_loaded_v.producer_acquire();
          source.template load<LoadedV>(at, shared + kLoadedV, pipe_loaded_v.stage, &p.v_map, pipe_loaded_v.full_barrier(), head_kv, n,
                                        leader);
          pipe_loaded_v.advance();
          // No earlier: consumers still need Q of the last work tile.
          if (q_is_due) load_q(work, seq, leader);
          q_is_due = false;
        }
      }
    }
    scheduler.reset_counters(leader);
  }

  // Producer warp of Q.
  __device__ __forceinline__ void produce_q() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tma_prefetch_map(&p.q_map);
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.get_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      if (first_tile(work, seq, block_band(work, seq, work.block_m * C.block_m)) < 0) continue;
      load_q(work, seq, leader);
    }
  }

  // Producer warp `warp` of transposed V (value_operand.cuh).
  __device__ __forceinline__ void transpose_v(int warp) {
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.get_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      const BlockBand<C> band = block_band(work, seq, work.block_m * C.block_m);
      const RowRange seen = v_rows_seen(band);
#pragma unroll 1
      for (int n = first_tile(work, seq, band); n >= 0; n = band.next_tile(n)) {
        pipe_loaded_v.consumer_wait();
        pipe_v.producer_acquire();
        Values::transpose(shared + kLoadedV + pipe_loaded_v.stage * LoadedV::kBytes, shared + kV + pipe_v.stage * TileV::kBytes, n, seen,
                          warp);
        if (threadIdx.x % 32 == 0) {
          ptx::mbarrier_arrive(pipe_loaded_v.empty_barrier());
          ptx::mbarrier_arrive(pipe_v.full_barrier());
        }
        pipe_loaded_v.advance();
        pipe_v.advance();
      }
    }
  }

  // Producer warp of V. V has a warp of its own because it is needed later than K, and because rows
  // that no query sees have to be overwritten with zeros.
  __device__ __forceinline__ void produce_v() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tma_prefetch_map(&p.v_map);
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.get_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      const BlockBand<C> band = block_band(work, seq, work.block_m * C.block_m);
      const Source source(p, seq, work.batch);
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
#pragma unroll 1
      for (int n = first_tile(work, seq, band); n >= 0; n = band.next_tile(n)) {
        const auto at = source.locate(n, band.keys());
        pipe_v.producer_acquire();
        const RowRange seen = v_rows_seen(band);
        if (kUnmasked || seen.covers(n * C.block_n, C.block_n)) {
          source.template load<TileV>(at, shared + kV, pipe_v.stage, &p.v_map, pipe_v.full_barrier(), head_kv, n, leader);
        } else if constexpr (!kUnmasked) {
          source.template load<TileV>(at, shared + kV, pipe_v.stage, &p.v_map, shared + kZeroFill, head_kv, n, leader);
          ptx::mbarrier_wait(shared + kZeroFill, zero_fill_phase);
          zero_fill_phase ^= 1;
          zero_unseen(seen, n);
          if (leader) ptx::mbarrier_arrive(pipe_v.full_barrier());
        }
        pipe_v.advance();
      }
    }
  }

 protected:
  // The keys that a block visits for a work tile whose rows begin at `first_row`.
  __device__ __forceinline__ BlockBand<C> block_band(const WorkTile& work, const Sequence& seq, int first_row) const {
    return BlockBand<C>(p.fwd, seq, first_row, work.split, Source::splits(p));
  }
  // -1 if the rows of this work tile do not exist or see no key: no role then touches a pipeline.
  __device__ __forceinline__ int first_tile(const WorkTile& work, const Sequence& seq, const BlockBand<C>& band) const {
    return work.block_m * C.block_m < row_count<C>(p.fwd, seq) ? band.first_tile() : -1;
  }

  // Q of a work tile. Each consumer warpgroup has a Q buffer of its own, so that one can start the
  // next work tile while another still computes this one.
  __device__ __forceinline__ void load_q(const WorkTile& work, const Sequence& seq, bool leader) {
#pragma unroll 1
    for (int i = 0; i < kConsumers; ++i) {
      // In the order in which they release Q: with a left bound, later rows reach their last tile
      // first.
      const int w = C.left_bound ? kConsumers - 1 - i : i;
      const TmaPipeline<1> pipe = pipe_q.neighbour(w);
      pipe.producer_acquire();
      if (leader) load_q(pipe.full_barrier(), w, work, seq);
    }
    pipe_q.advance();
  }

  // Q of consumer warpgroup `w`.
  __device__ __forceinline__ void load_q(uint32_t barrier, int w, const WorkTile& work, const Sequence& seq) const {
    const uint32_t tile = shared + kQ + w * TileQ::kBytes;
    const int row = seq.q_row + query_of<C>(p.fwd, work.block_m * C.block_m + w * kWarpgroupRows);
    ptx::mbarrier_arrive_expect_tx(barrier, TileQ::kBytes);
    if constexpr (C.pack_gqa) {
      TileQ::load_packed(tile, &p.q_map, barrier, row, work.head, seq.batch, kEvictFirst);
    } else {
      TileQ::load(tile, &p.q_map, barrier, row, work.head, seq.batch, kEvictFirst);
    }
  }

  // Rows of V that some query sees. TMA zero-fills what lies outside the tensor, not what lies
  // outside this sequence or what no query of the block sees. A NaN there would survive a
  // probability of zero (0 * NaN), so the producer zeroes those rows. K needs none of this: its NaN
  // ends in masked scores.
  static __device__ __forceinline__ RowRange v_rows_seen(const Band<C>& band) {
    RowRange seen = band.keys();
    if (Source::kEndsWithTensor && seen.end == band.length_k) seen.end = kUnbounded;
    return seen;
  }
  __device__ __forceinline__ void zero_unseen(const RowRange& seen, int n) const {
    const int first = n * C.block_n, last = first + C.block_n;
    zero_rows(min(max(first, seen.end), last) - first, C.block_n);
    if constexpr (C.left_bound) zero_rows(max(first, seen.sinks) - first, min(last, seen.begin) - first);
    ptx::fence_proxy_async();
    __syncwarp();
  }
  __device__ __forceinline__ void zero_rows(int begin, int end) const {
    constexpr int kChunks = C.v_head_dim * bytes_of(C.v_dtype) / 16;
    const uint32_t sV = shared + kV + pipe_v.stage * TileV::kBytes;
    for (int i = begin * kChunks + static_cast<int>(threadIdx.x) % 32; i < end * kChunks; i += 32) {
      ptx::store_shared_16(sV + TileV::offset(i / kChunks, i % kChunks), {0, 0, 0, 0});
    }
  }
};

}  // namespace fa
