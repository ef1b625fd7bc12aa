// SPDX-License-Identifier: Apache-2.0
// Backward attention with mma.sync: FlashAttention-2 (arXiv 2307.08691), Algorithm 2, for sm_80 and
// every later architecture.
//
// A block owns block_n keys of one KV head, and visits the tiles of Q and dO that see some of them,
// of all query heads that read this KV head: dK and dV stay in registers and need no atomics. Where
// keys are few, several blocks own the same ones, each visits some of those heads, and
// bwd_postprocess adds what they find. dQ is added to a float32 accumulator in global memory. P and
// dS go through shared memory, so that each of the five products may cut its result among the warps
// in its own way.
#pragma once

#include "attention/backward_block.cuh"
#include "attention/score_tile.cuh"
#include "kernels/fa2_bwd_narrow.cuh"

namespace fa {

template <Config C>
struct Fa2Backward : BackwardBlock<C> {
  using Base = BackwardBlock<C>;
  using Base::kStages, Base::kStageBytes, Base::p, Base::seq, Base::batch, Base::first_key, Base::tiles, Base::next, Base::kFragments;
  using Base::lane_row, Base::lane_col;
  using typename Base::QueryTile, typename Base::DqPart, typename Base::TileQ, typename Base::TileK, typename Base::TileV;
  using typename Base::Traits;
  using TileP = SharedTile<C.block_m, C.block_n>;

  using ProductS = WarpProduct<C.dtype, C.block_m, C.block_n, C.warps>;  // S and dP
  using ProductK = WarpProduct<C.dtype, C.block_n, C.head_dim, C.warps>;
  using ProductV = WarpProduct<C.dtype, C.block_n, C.v_head_dim, C.warps>;
  using Scores = ScoreTile<C, ProductS::kBlocks, ProductS::kWarpCols, false>;
  static constexpr int kBlocks = ProductS::kBlocks;

  // Two stages of Q and dO: the next tile is loaded while this one's dV is computed. Three: a tile
  // earlier.
  static_assert(kStages >= 1 && kStages <= 3);

  // Of shared memory.
  static constexpr int kBytes = TileK::kBytes + TileV::kBytes + kStages * kStageBytes + 2 * TileP::kBytes;
  const uint32_t sK, sV, sQ, sP;

  typename ProductK::Accumulator rK;  // dK, dV
  typename ProductV::Accumulator rV;

  __device__ __forceinline__ Fa2Backward(const BwdParams& params, const Sequence& s, int block_n, int heads, int sequence, uint32_t shared)
      : Base(params, s, block_n, heads, sequence),
        sK(shared),
        sV(sK + TileK::kBytes),
        sQ(sV + TileV::kBytes),
        sP(sQ + kStages * kStageBytes) {}

  __device__ __forceinline__ void run() {
    this->load_keys(sK, sV);
    ProductK::clear(rK);
    ProductV::clear(rV);
    if (tiles.begin < tiles.end) mainloop();
    ptx::cp_async_wait<0>();
    this->template store_dk_and_dv<ProductK, ProductV>(rK, rV);
  }

 private:
  __device__ __forceinline__ uint32_t at(int stage) const { return sQ + stage * kStageBytes; }

  // Algorithm 2, lines 10 to 17, over the tiles of queries of one head after the other.
  //
  // What is not a product hides behind one: exponentials behind dP, dS behind dV. Two barriers a
  // tile: P, then dS are complete. Whatever was read before one may be overwritten behind the next.
  __device__ __forceinline__ void mainloop() {
    QueryTile tile = this->ahead, added = {-1, 0};
    int stage = 0;
    bool ready = !C.deterministic || threadIdx.x != Base::kThreads - 1;
    this->load_next(at(0));
    if constexpr (kStages == 3) this->load_next(at(1));
    ptx::cp_async_wait<kStages == 3>();
    __syncthreads();  // the copies of all threads have landed
    DqPart part;
    for (; tile.head < this->end_head(); this->advance(tile)) {
      const uint32_t q = at(stage), dout = q + TileQ::kBytes, sS = sP + TileP::kBytes;
      typename ProductS::Accumulator rP, rS, slope;  // rP: S, then P; rS: dP, then dS
      compute_p_and_dp(tile, q, rP, rS, slope, part);
      write<C.dropout>(sP, rP);
      this->wait_for_turn(tile, ready);
      __syncthreads();  // P is complete
      if constexpr (kStages > 1) this->load_next(at(next(stage, kStages - 1)));
      ProductV::template multiply<C.block_m / 16>(rV, Operand<C.block_m, C.block_n>::a_transposed(sP),
                                                  Operand<C.block_m, C.v_head_dim>::b_transposed(dout));
      compute_ds(rP, rS, slope, q);
      write(sS, rS);
      if constexpr (kStages > 1) ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // dS is complete, and the next tile has landed
      ready = this->take_turns(added, tile);
      compute_dk_and_dq(tile, q, sS, part);
      if constexpr (kStages == 1) {
        __syncthreads();
        this->load_next(at(0));
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      stage = next(stage);
    }
    this->add_dq(part, kLate, kFragments);
    if constexpr (C.deterministic) __syncthreads();
    this->pass_turn(added);
  }

  // dQ = dS K, dK += dS^T Q. Additions to dQ go between products, because all reads of shared
  // memory would have to wait for a burst of them: some beside dK, the others beside S of the next
  // tile.
  static constexpr int kLate = kFragments / 2;  // the first of them
  __device__ __forceinline__ void compute_dk_and_dq(const QueryTile& tile, uint32_t q, uint32_t sS, DqPart& part) {
#pragma unroll
    for (int chunk = 0; chunk < C.head_dim; chunk += Base::kColsOfDq) {
      if (chunk > 0) this->add_dq(part, 0, kFragments);
      this->compute_dq(part, tile, Operand<C.block_m, C.block_n>::a(sS), sK, chunk);
    }
    constexpr int kSteps = C.block_m / 16;
    ProductK::template multiply<kSteps>(rK, Operand<C.block_m, C.block_n>::a_transposed(sS),
                                        Operand<C.block_m, C.head_dim>::b_transposed(q),
                                        [&](int k) { this->add_dq(part, k * kLate / kSteps, (k + 1) * kLate / kSteps); });
  }

  // S = Q K^T, P = exp(S - LSE), dP = dO V^T.
  __device__ __forceinline__ void compute_p_and_dp(const QueryTile& query, uint32_t stage, typename ProductS::Accumulator& rP,
                                                   typename ProductS::Accumulator& rS, typename ProductS::Accumulator& slope,
                                                   const DqPart& part) const {
    const int n = (first_key + ProductS::col()) / ProductS::kWarpCols;
    Scores tile(p.fwd, {query.m, query.head, batch}, seq, query.m * C.block_m + ProductS::row());
    ProductS::clear(rP);
    constexpr int kSteps = C.head_dim / 16, kAdded = kFragments - kLate;
    ProductS::template multiply<kSteps>(rP, Operand<C.block_m, C.head_dim>::a(stage), Operand<C.block_n, C.head_dim>::b(sK),
                                        [&](int k) { this->add_dq(part, kLate + k * kAdded / kSteps, kLate + (k + 1) * kAdded / kSteps); });

    if constexpr (C.softcap) for_each([&](int b, int t, int e) { slope[b][t][e] = tile.score.cap_slope(rP[b][t][e]); });
    tile.apply_scale_and_bias(rP, n);
    const bool masked = tile.band.template needs_mask<ProductS::kWarpCols>(n);
    if (masked) tile.apply_mask(rP, n);

    RowStatistics row[kBlocks][2];
    read_statistics(row, stage);
    bool unusual = false;  // rows that see nothing, and huge scores
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) unusual |= fabsf(row[i / 2][i % 2].lse_log2) > OnlineSoftmax<1>::kLargestFused;
    unusual = __any_sync(0xffffffffu, unusual);
    for_each([&](int b, int t, int e) { rP[b][t][e] = fmaf(rP[b][t][e], tile.score.factor, -row[b][e / 2].lse_log2); });
    // An exponent is never positive, except for the rounding of huge scores.
    if (unusual) for_each([&](int b, int t, int e) { rP[b][t][e] = rP[b][t][e] > 0.f ? 0.f : rP[b][t][e]; });
    for_each([&](int b, int t, int e) { rP[b][t][e] = ptx::exp2(rP[b][t][e]); });

    ProductS::clear(rS);
    ProductS::template multiply<C.v_head_dim / 16>(rS, Operand<C.block_m, C.v_head_dim>::a(stage + TileQ::kBytes),
                                                   Operand<C.block_n, C.v_head_dim>::b(sV));
    // A hidden element, whatever its dP is.
    if (masked || unusual) for_each([&](int b, int t, int e) { rS[b][t][e] = rP[b][t][e] == 0.f ? 0.f : rS[b][t][e]; });
    if constexpr (C.dropout) {
      for_each([&](int b, int t, int e) { rS[b][t][e] *= p.fwd.dropout_rescale; });
      // The sign of a probability says that it is dropped.
      tile.for_each_dropped(n, [&](int b, int t, int e) { rP[b][t][e] = -rP[b][t][e], rS[b][t][e] = 0.f; });
    }
  }

  static __device__ __forceinline__ void read_statistics(RowStatistics (&row)[kBlocks][2], uint32_t stage) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        ptx::load_shared_8(row[b][r].lse_log2, row[b][r].delta, Base::statistics_at(stage, ProductS::row() + 16 * b + 8 * r + lane_row()));
  }

  // dS = P (dP - delta), times the slope of the softcap.
  static __device__ __forceinline__ void compute_ds(const typename ProductS::Accumulator& rP, typename ProductS::Accumulator& rS,
                                                    const typename ProductS::Accumulator& slope, uint32_t stage) {
    RowStatistics row[kBlocks][2];
    read_statistics(row, stage);
    for_each([&](int b, int t, int e) {
      rS[b][t][e] = fabsf(rP[b][t][e]) * (rS[b][t][e] - row[b][e / 2].delta);
      if constexpr (C.softcap) rS[b][t][e] *= slope[b][t][e];
    });
  }

  template <class Visit>
  static __device__ __forceinline__ void for_each(Visit visit) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < ProductS::kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(b, t, e);
  }

  // To 16 bits and shared memory; with kPositive, negative numbers as zeros.
  template <bool kPositive = false>
  static __device__ __forceinline__ void write(uint32_t tile, const typename ProductS::Accumulator& x) {
    const int lane_first_row = ProductS::row() + lane_row(), first_chunk = ProductS::col() / 8;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < ProductS::kTiles; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t target = tile + TileP::offset(lane_first_row + 16 * b + 8 * r, first_chunk + t) + 2 * lane_col();
          float lo = x[b][t][2 * r], hi = x[b][t][2 * r + 1];
          if constexpr (kPositive) lo = lo < 0.f ? 0.f : lo, hi = hi < 0.f ? 0.f : hi;
          ptx::store_shared_4(target, Traits::pack(lo, hi));
        }
  }
};

template <Config C, bool = kNarrow<C>>
struct BackwardOf {
  using Block = Fa2Backward<C>;
};
template <Config C>
struct BackwardOf<C, true> {
  using Block = Fa2BackwardNarrow<C>;
};

// Blocks walk the (sequence, KV head) pairs in groups of `section_pairs`, whose keys they take side
// by side, those that the most queries see first: the grid ends with short blocks. Split, each part
// of the query heads of a KV head makes a pair of its own.
template <Config C>
__device__ __forceinline__ void fa2_backward(const BwdParams& p) {
  using Block = typename BackwardOf<C>::Block;
  extern __shared__ __align__(1024) unsigned char shared[];
  int index = blockIdx.x;
  if constexpr (C.deterministic) index = DqTurns<C>::draw_ticket(p, ptx::shared_address(shared) + Block::kBytes);
  const int per_group = p.section_pairs * p.blocks_n, group = index / per_group;
  const int first = group * p.section_pairs, width = min(p.section_pairs, p.fwd.batch * head_parts<C>(p) - first);
  const int rest = index - group * per_group, column = rest / width, pair = first + rest - column * width;
  const int batch = pair / head_parts<C>(p), part = pair - batch * head_parts<C>(p);
  const int block_n = C.left_bound && !C.right_bound && !C.deterministic ? p.blocks_n - 1 - column : column;
  const Sequence seq = read_sequence<C.varlen>(p.fwd, batch);
  if (block_n * C.block_n < seq.length_k) Block(p, seq, block_n, part, batch, ptx::shared_address(shared)).run();
}

}  // namespace fa
