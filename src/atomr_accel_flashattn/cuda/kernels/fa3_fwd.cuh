// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper: FlashAttention-3 (arXiv 2407.08608).
//
// Warp specialisation: three producer warps load tiles of Q, K and V by TMA; one to four consumer
// warpgroups of 64 rows multiply with wgmma. Ping-pong barriers order the products of the
// warpgroups (section 3.1), and each computes the softmax of one tile during the products of the
// next (3.2).
#pragma once

#include "attention/block_band.cuh"
#include "attention/kv_source.cuh"
#include "attention/persistent_scheduler.cuh"
#include "attention/rows.cuh"
#include "attention/unowned_rows.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/ping_pong.cuh"
#include "tile/swizzled_tile.cuh"
#include "tile/tma_pipeline.cuh"

namespace fa {

// `Source` says where K and V are (attention/kv_source.cuh).
template <Config C, class Source = TensorKv<C>>
struct Fa3Forward {
  static constexpr int kConsumers = C.warps / 4 - 1;
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kStepsQK = C.head_dim / MmaTraits<C.dtype>::kStep;   // of Q K^T
  static constexpr int kStepsPV = C.block_n / MmaTraits<C.v_dtype>::kStep;  // of P V
  static_assert(C.block_m == kConsumers * kWarpgroupRows, "a consumer warpgroup has 64 rows");
  static_assert(C.aligned, "TMA needs 16-byte strides");
  static_assert(!C.pack_gqa || !(C.alibi || C.dropout), "slopes and the generator's counter differ between the heads of a tile");

  using Rows = WarpRows<C, 1>;
  using TileQ = SwizzledTile<kWarpgroupRows, C.head_dim, bytes_of(C.dtype)>;  // of one warpgroup
  using TileK = SwizzledTile<C.block_n, C.head_dim, bytes_of(C.k_dtype)>;
  using TileV = SwizzledTile<C.block_n, C.v_head_dim, bytes_of(C.v_dtype)>;
  using Params = typename Source::Params;
  using Scheduler = PersistentScheduler<Params, C.persistent, C.split>;

  // Offsets in shared memory, from an address aligned to 1024 bytes, the period of the swizzle.
  static constexpr int kQ = 0, kK = kQ + kConsumers * TileQ::kBytes, kV = kK + C.stages * TileK::kBytes,
                       kBarriersQ = kV + C.stages * TileV::kBytes;
  static constexpr int kBarriersK = kBarriersQ + kConsumers * TmaPipeline<1>::kBytes,
                       kBarriersV = kBarriersK + TmaPipeline<C.stages>::kBytes;
  static constexpr int kZeroFill = kBarriersV + TmaPipeline<C.stages>::kBytes, kScheduler = kZeroFill + TmaPipeline<1>::kBytes;
  static constexpr int kThere = kScheduler + Scheduler::kBytes;  // a word for each stage of K
  static_assert(kThere + (Source::kHasHoles ? 4 * C.stages : 0) <= kBarriersQ + 512, "kernels/fa3_fwd.py leaves 512 bytes for barriers");

  // Registers per thread after setmaxnreg, which moves them from the producer warpgroup to the
  // consumers; 64 Ki in all.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

  // Every row sees every key that the tensor has.
  static constexpr bool kUnmasked = Source::kEndsWithTensor && !C.left_bound && !C.right_bound;

  const Params& p;
  const uint32_t shared;
  TmaPipeline<1> pipe_q;
  TmaPipeline<C.stages> pipe_k, pipe_v;
  Scheduler scheduler;
  int zero_fill_phase = 0;
  static constexpr PingPongBarrier<C.ping_pong, kConsumers> ping_pong{};

  // `warpgroup`: index among the consumers; unused by producers.
  __device__ __forceinline__ Fa3Forward(const Params& params, uint32_t address, int warpgroup)
      : p(params),
        shared(address),
        pipe_q(address + kBarriersQ + warpgroup * TmaPipeline<1>::kBytes),
        pipe_k(address + kBarriersK),
        pipe_v(address + kBarriersV),
        scheduler(params, address + kScheduler) {}

  static __device__ __forceinline__ void init_barriers(uint32_t shared) {
    for (int w = 0; w < kConsumers; ++w) TmaPipeline<1>::init(shared + kBarriersQ + w * TmaPipeline<1>::kBytes, 1, 1);
    TmaPipeline<C.stages>::init(shared + kBarriersK, 1, kConsumers);
    TmaPipeline<C.stages>::init(shared + kBarriersV, 1, kConsumers);
    ptx::mbarrier_init(shared + kZeroFill, 1);
    Scheduler::init(shared + kScheduler, 4 * kConsumers + 2);
    ptx::mbarrier_init_fence();
  }

  // Registers of asynchronous wgmma: S is its accumulator, P its A operand. Neither may be touched
  // between issue and wgmma_wait.
  struct Fragments : KeysThere<Source::kHasHoles> {
    typename Rows::Scores S;
    uint32_t P[kStepsPV][4];

    __device__ __forceinline__ void pack_p() {
#pragma unroll
      for (int k = 0; k < kStepsPV; ++k) Rows::pack_probabilities(P[k], S, 0, k);
    }
  };

  // Producer warp of K, which also runs the tile scheduler. Control flow is uniform over the warp;
  // one elected lane issues.
  __device__ __forceinline__ void produce_k() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tma_prefetch_map(&p.k_map);
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.broadcast_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      const BlockBand<C> band = block_band(work, seq, work.block_m * C.block_m);
      const Source source(p, seq, work.batch);
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
      int n = first_tile(work, seq, band);
      if (n < 0) scheduler.prefetch_next();
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
      }
    }
    scheduler.reset_counters(leader);
  }

  // Producer warp of Q. Each consumer warpgroup has a Q buffer of its own, so that one can start
  // the next work tile while another still computes this one.
  __device__ __forceinline__ void produce_q() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tma_prefetch_map(&p.q_map);
    for (WorkTile work = scheduler.first(); !work.past_end(); work = scheduler.get_next()) {
      const Sequence seq = Source::read_sequence(p, work.batch);
      if (first_tile(work, seq, block_band(work, seq, work.block_m * C.block_m)) < 0) continue;
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

  // Consumer warpgroup. Work tiles overlap: prologue() issues the first S of the next one during
  // the last PV of this one, and that S runs during the stores of O.
  __device__ __forceinline__ void consume(int warpgroup) {
    ping_pong.begin(warpgroup);
    Fragments r;
    TileContext current = prologue(scheduler.first(), r, warpgroup, [] {});
    ptx::wgmma_wait<0>();
    ptx::warpgroup_fence_operand(r.S[0]);
    while (!current.work.past_end()) {
      const int first_row = current.work.block_m * C.block_m;
      Rows rows(p.fwd, current.work, current.seq, first_row + (warp_index() - 4) * 16);
      bool pending = current.n >= 0;  // a PV product is in flight
      int n = pending ? mainloop(rows, r, current.walk, current.n, warpgroup) : -1;
      auto drain_pv = [&] {
        ptx::wgmma_wait<0>();
        ptx::warpgroup_fence_operand(rows.rO[0]);
        if (pending) pipe_v.consumer_release();
        pending = false;
      };
      const auto lse = [&] {
        if constexpr (C.split) {
          return p.partial_sum + current.work.split * p.lse_rows;
        } else {
          return p.fwd.lse;
        }
      };
      // With sink tokens no tile is skipped at the end, and draining later costs registers that
      // spill.
      if constexpr (C.sink_tokens) drain_pv();
#pragma unroll 1
      for (; n >= 0; n = current.walk.block.next_tile(n)) skip_tile(warpgroup, drain_pv);
      TileContext next{WorkTile::none()};
      if constexpr (C.persistent) {
        next = prologue(scheduler.get_next(), r, warpgroup, drain_pv);
        rows.finalize(lse);
        ptx::wgmma_wait<1>();
        ptx::warpgroup_fence_operand(rows.rO[0]);
        if (pending) pipe_v.consumer_release();
      } else {
        ptx::optimisation_barrier(next.work.block_m);
        rows.finalize(lse);
        drain_pv();
      }
      if (first_row < row_count<C>(p.fwd, current.seq)) {
        if constexpr (C.split) {
          rows.store_partial(p.partial_o + current.work.split * p.lse_rows * p.fwd.v_head_dim);
        } else {
          rows.store();
        }
      }
      ptx::wgmma_wait<0>();
      ptx::warpgroup_fence_operand(r.S[0]);
      current = next;
    }
  }

 private:
  // The keys that a block visits for a work tile whose rows begin at `first_row`.
  __device__ __forceinline__ BlockBand<C> block_band(const WorkTile& work, const Sequence& seq, int first_row) const {
    return BlockBand<C>(p.fwd, seq, first_row, work.split, Source::splits(p));
  }
  // -1 if the rows of this work tile do not exist or see no key: no role then touches a pipeline.
  __device__ __forceinline__ int first_tile(const WorkTile& work, const Sequence& seq, const BlockBand<C>& band) const {
    return work.block_m * C.block_m < row_count<C>(p.fwd, seq) ? band.first_tile() : -1;
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

  // The K / V tiles that the block visits, of which a warpgroup computes those that its own rows
  // see.
  struct TileWalk {
    BlockBand<C> block;
    Band<C> own;
    // The next tile that this warpgroup computes, -1 if there is none. With sink tokens it computes
    // all: tiles that it does not see may lie between its window and the sinks.
    __device__ __forceinline__ int next(int n) const {
      const int next = block.next_tile(n);
      return next >= 0 && (C.sink_tokens || own.sees(next)) ? next : -1;
    }
  };

  // A work tile, and the first K / V tile that this warpgroup computes, or -1.
  struct TileContext {
    WorkTile work;
    Sequence seq;
    TileWalk walk;
    int n;
  };

  // Skips to the first K / V tile that this warpgroup sees and issues its S = Q K^T.
  template <class DrainPv>
  __device__ __forceinline__ TileContext prologue(const WorkTile& work, Fragments& r, int warpgroup, DrainPv drain_pv) {
    const int first_row = max(work.block_m, 0) * C.block_m;
    const Sequence seq = Source::read_sequence(p, work.batch);
    const TileWalk walk{block_band(work, seq, first_row), Band<C>(p.fwd, seq, first_row + warpgroup * kWarpgroupRows, kWarpgroupRows)};
    int n = work.past_end() ? -1 : first_tile(work, seq, walk.block);
    const bool visited = n >= 0;
    if (visited) pipe_q.consumer_wait();
#pragma unroll 1
    for (; n >= 0 && !walk.own.sees(n); n = walk.block.next_tile(n)) skip_tile(warpgroup, drain_pv);
    if (n >= 0) {
      pipe_k.consumer_wait();
      read_there(r);
      ping_pong.sync(warpgroup);
    } else if (visited) {
      pipe_q.consumer_release();
    }
    // Also issued when no tile is left (result unused): with a branch here ptxas serialises wgmma
    // (warnings C75xx).
    multiply_qk(r, warpgroup);
    if (n >= 0) ping_pong.arrive_next(warpgroup);
    return {work, seq, walk, n};
  }

  // Algorithm 2 of the paper: S of the next tile is multiplied during the softmax of this one. On
  // return the last PV is still in flight; returns the next tile that the block visits.
  __device__ __forceinline__ int mainloop(Rows& rows, Fragments& r, const TileWalk& walk, int n, int warpgroup) {
    int next = walk.next(n);
    pipe_k.consumer_release();
    if (next < 0) pipe_q.consumer_release();
    rows.apply_bias_and_mask(r.S, n, static_cast<const KeysThere<Source::kHasHoles>&>(r));
    rows.online_softmax(r.S, n);  // nothing to rescale yet
    r.pack_p();
    while (next >= 0) {
      pipe_k.consumer_wait();
      read_there(r);
      ping_pong.sync(warpgroup);
      multiply_qk(r, warpgroup);
      pipe_v.consumer_wait();
      multiply_pv(rows, r);
      ping_pong.arrive_next(warpgroup);
      n = next;
      next = walk.next(n);
      ptx::wgmma_wait<1>();
      ptx::warpgroup_fence_operand(r.S[0]);
      pipe_k.consumer_release();
      if (next < 0) pipe_q.consumer_release();  // early: the producer waits for it
      rows.apply_bias_and_mask(r.S, n, static_cast<const KeysThere<Source::kHasHoles>&>(r));
      const bool grew = rows.online_softmax(r.S, n);
      ptx::wgmma_wait<0>();
      ptx::warpgroup_fence_operand(rows.rO[0]);
      pipe_v.consumer_release();
      r.pack_p();
      if (grew) rows.rescale_output();
    }
    pipe_v.consumer_wait();
    multiply_pv(rows, r);
    return walk.block.next_tile(n);
  }

  // Skip a tile that is fully masked for this warpgroup. Order matters:
  // 1. Pass the ping-pong barrier first: another warpgroup waits for this turn, else deadlock.
  // 2. Drain PV, so that stages of V are released in order.
  // 3. All four warps observe `full` before one thread arrives on `empty` for them: otherwise the
  //    producer may refill the stage, and a late warp finds the parity flipped twice (ABA) and
  //    hangs.
  template <class DrainPv>
  __device__ __forceinline__ void skip_tile(int warpgroup, DrainPv drain_pv) {
    ping_pong.sync(warpgroup);
    ping_pong.arrive_next(warpgroup);
    drain_pv();
    pipe_k.consumer_wait();
    pipe_v.consumer_wait();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    pipe_k.consumer_release();
    pipe_v.consumer_release();
  }

  // Which keys of the stage of K there are. Read before the product of the warpgroup, whose end
  // releases the stage.
  __device__ __forceinline__ void read_there(Fragments& r) const {
    if constexpr (Source::kHasHoles) r.there = ptx::load_shared_4(shared + kThere + 4 * pipe_k.stage);
  }

  // S = Q K^T: SS-wgmma, one commit group.
  __device__ __forceinline__ void multiply_qk(Fragments& r, int warpgroup) {
    using Mma = ptx::Wgmma<C.block_n, C.dtype, C.k_dtype>;
    const uint32_t sQ = shared + kQ + warpgroup * TileQ::kBytes, sK = shared + kK + pipe_k.stage * TileK::kBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepsQK; ++k) Mma::ss(r.S[0], TileQ::k_major(sQ, k), TileK::k_major(sK, k), k > 0);
    ptx::wgmma_commit();
  }

  // O += P V: RS-wgmma, one commit group.
  __device__ __forceinline__ void multiply_pv(Rows& rows, const Fragments& r) {
    using Mma = ptx::Wgmma<C.v_head_dim, C.v_dtype, C.v_dtype>;
    const uint32_t sV = shared + kV + pipe_v.stage * TileV::kBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepsPV; ++k) Mma::rs(rows.rO[0], r.P[k], TileV::mn_major(sV, k));
    ptx::wgmma_commit();
  }
};

template <Config C, class Source = TensorKv<C>>
__device__ __forceinline__ void fa3_forward(const typename Source::Params& p) {
  using Kernel = Fa3Forward<C, Source>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t address = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int warpgroup = warpgroup_index(), warp = warp_index();
  if (threadIdx.x == 0) Kernel::init_barriers(address);
  __syncthreads();
  Kernel kernel(p, address, max(warpgroup - 1, 0));
  if (warpgroup == 0) {
    if constexpr (Kernel::kConsumers > 1) ptx::setmaxnreg_dec<Kernel::kProducerRegisters>();
    if (warp == 0) kernel.produce_k();
    if (warp == 1) kernel.produce_v();
    if (warp == 2) kernel.produce_q();
    if (warp == 3 && !C.split) write_unowned_rows<C>(p.fwd, blockIdx.x, gridDim.x, threadIdx.x % 32, 32);
  } else {
    if constexpr (Kernel::kConsumers > 1) ptx::setmaxnreg_inc<Kernel::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
}

}  // namespace fa
