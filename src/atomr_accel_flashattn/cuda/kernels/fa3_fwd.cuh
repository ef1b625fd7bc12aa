// SPDX-License-Identifier: Apache-2.0
// Forward attention on Hopper: FlashAttention-3 (arXiv 2407.08608).
//
// Warp specialisation: three producer warps load tiles of Q, K and V by TMA; one to four consumer
// warpgroups of 64 rows multiply with wgmma. Ping-pong barriers order the products of the
// warpgroups (section 3.1), and each computes the softmax of one tile during the products of the
// next (3.2).
#pragma once

#include "attention/block_descales.cuh"
#include "attention/pv_product.cuh"
#include "attention/rows.cuh"
#include "attention/unowned_rows.cuh"
#include "kernels/fa3_producer.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile/ping_pong.cuh"

namespace fa {

template <Config C, class Source = TensorKv<C>>
struct Fa3Forward : Fa3Producer<C, Source> {
  using Block = Fa3Producer<C, Source>;
  using Block::block_band, Block::first_tile;
  using Block::kConsumers, Block::kWarpgroupRows, Block::kQ, Block::kK, Block::kV, Block::kThere;
  using Block::p, Block::shared, Block::pipe_q, Block::pipe_k, Block::pipe_v, Block::scheduler;
  using typename Block::Params, typename Block::TileQ, typename Block::TileK, typename Block::TileV, typename Block::Values;
  static constexpr bool kDescaled = Score<C>::kDescaled;
  using Rows = WarpRows<C, 1>;
  static_assert(C.pv_sum == PvSum::InO || ProbabilityRange<C.p_dtype()>::kGrowsOften, "rescale is there in every tile");
  using Product = PvProduct<C, Rows>;
  using Scales = BlockDescales<C, Params>;
  static constexpr int kStepsQK = C.head_dim / MmaTraits<C.dtype>::kStep;   // of Q K^T
  static constexpr int kStepsPV = C.block_n / MmaTraits<C.v_dtype>::kStep;  // of P V
  static constexpr PingPongBarrier<C.ping_pong, kConsumers> ping_pong{};

  using Block::Block;
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
      Rows rows(p.fwd, current.work, current.seq, first_row + (warp_index() - 4) * 16, kDescaled ? descale_qk(current.work) : 1.f);
      Scales scales(p, rows);
      bool pending = current.n >= 0;  // a PV product is in flight
      Product product;
      int n = -1;
      if constexpr (C.pv_sum == PvSum::InScores) {
        if (pending) n = mainloop_in_scores(rows, r, scales, current.walk, current.n, warpgroup);
        pending = false;
      } else {
        n = pending ? mainloop(rows, r, product, scales, current.walk, current.n, warpgroup) : -1;
      }
      auto drain_pv = [&] {
        ptx::wgmma_wait<0>();
        ptx::warpgroup_fence_operand(product.of(rows));
        if (pending) pipe_v.consumer_release();
        if (pending) product.add_last_to(rows);
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
        rows.finalize(lse, kDescaled ? descale_v(scales, current.work) : 1.f);
        ptx::wgmma_wait<1>();
        ptx::warpgroup_fence_operand(product.of(rows));
        if (pending) pipe_v.consumer_release();
        if (pending) product.add_last_to(rows);
      } else {
        ptx::optimisation_barrier(next.work.block_m);
        rows.finalize(lse, kDescaled ? descale_v(scales, current.work) : 1.f);
        drain_pv();
      }
      rows.normalise_by_sum_columns();
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
  // Factors of scores, and of O, that are constant over a work tile; fp8 only.
  __device__ __forceinline__ float descale_qk(const WorkTile& work) const {
    if constexpr (kDescaled && !C.block_descales) {
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
      return read_descale(p.q_descale, p.q_descale_stride, work.batch, head_kv, 0) *
             read_descale(p.k_descale, p.k_descale_stride, work.batch, head_kv, 0);
    }
    return 1.f;
  }
  __device__ __forceinline__ float descale_v(const Scales& scales, const WorkTile& work) const {
    if constexpr (C.block_descales) {
      return scales.unit;
    } else if constexpr (kDescaled) {
      return read_descale(p.v_descale, p.v_descale_stride, work.batch, kv_head_of<C>(p.fwd, work.head), 0);
    }
    return 1.f;
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
      read_there(r, warpgroup);
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

  // P of tile n in place of S, which is there; releases K. Whether rows.rescale of O is due, as
  // OnlineSoftmax::update().
  __device__ __forceinline__ bool softmax(Rows& rows, Fragments& r, Scales& scales, int n, int next) {
    ptx::warpgroup_fence_operand(r.S[0]);
    pipe_k.consumer_release();
    if (next < 0) pipe_q.consumer_release();  // early: the producer waits for it
    if constexpr (C.block_descales) scales.apply(r.S[0]);
    rows.apply_bias_and_mask(r.S, n, static_cast<const KeysThere<Source::kHasHoles>&>(r));
    const bool grew = rows.online_softmax(r.S, n);
    if constexpr (C.block_descales) scales.change_unit(r.S[0], rows.rescale[0]);
    return grew;
  }

  // Algorithm 2 of the paper: S of the next tile is multiplied during the softmax of this one. On
  // return the last PV is still in flight; returns the next tile that the block visits.
  __device__ __forceinline__ int mainloop(Rows& rows, Fragments& r, Product& product, Scales& scales, const TileWalk& walk, int n,
                                          int warpgroup) {
    int next = walk.next(n);
    pipe_k.consumer_release();
    if (next < 0) pipe_q.consumer_release();
    if constexpr (C.block_descales) {
      scales.load(n);
      scales.apply(r.S[0]);
    }
    rows.apply_bias_and_mask(r.S, n, static_cast<const KeysThere<Source::kHasHoles>&>(r));
    rows.online_softmax(r.S, n);  // nothing to rescale yet
    if constexpr (C.block_descales) scales.change_unit(r.S[0], rows.rescale[0]);
    r.pack_p();
    while (next >= 0) {
      pipe_k.consumer_wait();
      read_there(r, warpgroup);
      ping_pong.sync(warpgroup);
      multiply_qk(r, warpgroup);
      pipe_v.consumer_wait();
      multiply_pv<0, C.o_width(), Product::kAccumulates>(product.of(rows), r);
      ping_pong.arrive_next(warpgroup);
      n = next;
      next = walk.next(n);
      if constexpr (C.block_descales) scales.load(n);
      ptx::wgmma_wait<1>();
      const bool grew = softmax(rows, r, scales, n, next);
      ptx::wgmma_wait<0>();
      ptx::warpgroup_fence_operand(product.of(rows));
      pipe_v.consumer_release();
      r.pack_p();
      product.add_to(rows, grew);
    }
    pipe_v.consumer_wait();
    multiply_pv<0, C.o_width(), Product::kAccumulates>(product.of(rows), r);
    return walk.block.next_tile(n);
  }

  // One product after the other, as PV takes the registers that S has left for P, and S of the next
  // tile takes them back: a third fewer, for tiles of a third more keys. The other warpgroups'
  // softmax runs beside them. On return nothing is in flight.
  __device__ __forceinline__ int mainloop_in_scores(Rows& rows, Fragments& r, Scales& scales, const TileWalk& walk, int n, int warpgroup) {
    while (true) {
      const int next = walk.next(n);
      if constexpr (C.block_descales) scales.load(n);
      ptx::wgmma_wait<0>();
      softmax(rows, r, scales, n, next);
      // ptxas moves 32 registers of S out of the way of a narrow product otherwise: 2 % of a tile.
      if constexpr (C.o_width() == 64) __syncwarp();
      r.pack_p();
      const float factor[2] = {rows.rescale[0][0], rows.rescale[0][1]};
      pipe_v.consumer_wait();
      if (next >= 0) {
        if constexpr (Source::kHasHoles) {
          pipe_k.consumer_wait();
          read_there(r, warpgroup);
        }
        ping_pong.sync(warpgroup);
      }
      add_pv<0>(rows, r, factor);
      if (next < 0) return walk.block.next_tile(n);
      if constexpr (!Source::kHasHoles) pipe_k.consumer_wait();
      multiply_qk(r, warpgroup);
      ping_pong.arrive_next(warpgroup);
      n = next;
    }
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

  // Which keys of the stage of K there are. All four warps have read that before one thread arrives
  // on `empty` for them: they meet at their turn, which comes next, or else here. A wait for wgmma
  // orders nothing but its own reads.
  __device__ __forceinline__ void read_there(Fragments& r, int warpgroup) const {
    if constexpr (Source::kHasHoles) {
      r.there = ptx::load_shared_4(shared + kThere + 4 * pipe_k.stage);
      if constexpr (!ping_pong.kTakesTurns) ptx::named_barrier_sync(1 + warpgroup, 128);
    }
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

  // Columns [kFrom, kTo) of P V, added to d or alone: RS-wgmma, one commit group.
  template <int kFrom, int kTo, bool kAccumulate>
  __device__ __forceinline__ void multiply_pv(float (&d)[(kTo - kFrom) / 8][4], const Fragments& r) {
    using Mma = ptx::Wgmma<kTo - kFrom, C.p_dtype(), C.v_dtype>;
    const uint32_t sV = shared + kV + pipe_v.stage * TileV::kBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepsPV; ++k) {
      if (k == 0 && !kAccumulate) {
        Mma::template rs<false>(d, r.P[k], Values::descriptor(sV, k, kFrom));
      } else {
        Mma::rs(d, r.P[k], Values::descriptor(sV, k, kFrom));
      }
    }
    ptx::wgmma_commit();
  }

  // O = O * factor + P V from column kFrom on, product by product; releases V.
  template <int kFrom>
  __device__ __forceinline__ void add_pv(Rows& rows, const Fragments& r, const float (&factor)[2]) {
    constexpr bool kLast = kFrom + C.pv_columns >= C.v_head_dim;
    constexpr int kTo = kLast ? C.o_width() : kFrom + C.pv_columns, kColumns = kTo - kFrom;
    float product[kColumns / 8][4];
    multiply_pv<kFrom, kTo, false>(product, r);
    ptx::wgmma_wait<0>();
    ptx::warpgroup_fence_operand(product);
    if constexpr (kLast) pipe_v.consumer_release();
    add_product<kFrom / 8>(rows.rO[0], factor, product);
    if constexpr (!kLast) add_pv<kTo>(rows, r, factor);
  }
};

template <Config C, class Source = TensorKv<C>>
__device__ __forceinline__ void fa3_forward(const typename Source::Params& p) {
  using Kernel = Fa3Forward<C, Source>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t address = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int warpgroup = warpgroup_index(), warp = warp_index();
  if (threadIdx.x == 0) Kernel::init_barriers(address);
  if constexpr (C.sum_columns > 0) Kernel::Values::write_sum_columns(address + Kernel::kV);
  __syncthreads();
  Kernel kernel(p, address, max(warpgroup - 1, 0));
  if (warpgroup == 0) {
    if constexpr (Kernel::kConsumers > 1) ptx::setmaxnreg_dec<Kernel::kProducerRegisters>();
    if (warp == 0) kernel.produce_k();
    if constexpr (Kernel::kTransposesV) {
      if (warp > 0) kernel.transpose_v(warp - 1);
    } else {
      if (warp == 1) kernel.produce_v();
      if (warp == 2) kernel.produce_q();
    }
    if (warp == 3 && !C.split) write_unowned_rows<C>(p.fwd, blockIdx.x, gridDim.x, threadIdx.x % 32, 32);
  } else {
    if constexpr (Kernel::kConsumers > 1) ptx::setmaxnreg_inc<Kernel::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
}

}  // namespace fa
