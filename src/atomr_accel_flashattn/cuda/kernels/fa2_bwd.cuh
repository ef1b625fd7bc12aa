// SPDX-License-Identifier: Apache-2.0
// Backward attention with mma.sync: FlashAttention-2 (arXiv 2307.08691), Algorithm 2, for sm_80 and
// every later architecture.
//
// A block owns block_n keys of one KV head, and visits the tiles of Q and dO that see some of them,
// of all query heads that read this KV head: dK and dV stay in registers and need no atomics. dQ is
// added to a float32 accumulator in global memory. P and dS go through shared memory, so that each
// of the five products may cut its result among the warps in its own way.
#pragma once

#include "attention/epilogue.cuh"
#include "attention/score_tile.cuh"
#include "ptx/reduce.cuh"
#include "tile/loader.cuh"
#include "tile/product.cuh"

namespace fa {

template <Config C>
struct Fa2Backward {
  static constexpr int kThreads = C.warps * 32;

  using Traits = MmaTraits<C.dtype>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileO = SharedTile<C.block_m, C.v_head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  using TileP = SharedTile<C.block_m, C.block_n>;
  template <int kRows, int kCols>
  using Loader = TileLoader<kRows, kCols, kThreads, C.aligned, C.exact_head_dim>;
  template <int kRows, int kCols>
  using Product = WarpProduct<C.dtype, kRows, kCols, C.warps>;

  using ProductS = Product<C.block_m, C.block_n>;  // S and dP
  using ProductK = Product<C.block_n, C.head_dim>;
  using ProductV = Product<C.block_n, C.v_head_dim>;
  static constexpr int kColsOfDq = C.head_dim % 64 == 0 ? 64 : 32;  // at a time
  using ProductQ = Product<C.block_m, kColsOfDq>;
  using Scores = ScoreTile<C, ProductS::kBlocks, ProductS::kWarpCols, false>;
  static constexpr int kBlocks = ProductS::kBlocks;

  const BwdParams& p;
  const Sequence seq;
  const int batch, head_kv, first_key;
  const Band<C> band;  // of all queries of the sequence
  const uint32_t sK, sV, sQ, sO, sP, sS;

  typename ProductK::Accumulator rK;  // dK, dV
  typename ProductV::Accumulator rV;

  __device__ __forceinline__ Fa2Backward(const BwdParams& params, const Sequence& s, int block_n, int head, int sequence, uint32_t shared)
      : p(params),
        seq(s),
        batch(sequence),
        head_kv(head),
        first_key(block_n * C.block_n),
        band(params.fwd, s, 0, s.length_q),
        sK(shared),
        sV(sK + TileK::kBytes),
        sQ(sV + TileV::kBytes),
        sO(sQ + TileQ::kBytes),
        sP(sO + TileO::kBytes),
        sS(sP + TileP::kBytes) {}

  __device__ __forceinline__ void run() {
    const FwdParams& f = p.fwd;
    const Loader<C.block_n, C.head_dim> load_k(base(f.k, f.k_stride, seq.k_row, head_kv), f.k_stride.row, f.head_dim);
    const Loader<C.block_n, C.v_head_dim> load_v(base(f.v, f.v_stride, seq.k_row, head_kv), f.v_stride.row, f.v_head_dim);
    const RowRange keys = band.keys();
    load_k.load(sK, first_key, keys);
    load_v.load(sV, first_key, keys);
    ProductK::clear(rK);
    ProductV::clear(rV);
    for (int head = head_kv * f.heads_per_kv; head < (head_kv + 1) * f.heads_per_kv; ++head) mainloop(head);
    ptx::cp_async_wait<0>();
    store<ProductK>(rK, p.dk, p.dk_stride, f.head_dim, p.softmax_scale);
    store<ProductV>(rV, p.dv, p.dv_stride, f.v_head_dim, C.dropout ? f.dropout_rescale : 1.f);
  }

 private:
  static __device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int lane_col() { return static_cast<int>(threadIdx.x) % 4 * 2; }

  __device__ __forceinline__ const uint16_t* base(const void* x, const Strides& stride, int64_t row, int head) const {
    return static_cast<const uint16_t*>(x) + seq.batch * stride.batch + row * stride.row + head * stride.head;
  }

  // Algorithm 2, lines 10 to 17, over the queries of one head.
  __device__ __forceinline__ void mainloop(int head) {
    const FwdParams& f = p.fwd;
    const Loader<C.block_m, C.head_dim> load_q(base(f.q, f.q_stride, seq.q_row, head), f.q_stride.row, f.head_dim);
    const Loader<C.block_m, C.v_head_dim> load_o(base(p.dout, p.dout_stride, seq.q_row, head), p.dout_stride.row, f.v_head_dim);
    // Rows that see none of these keys count as zeros: what they hold may be NaN.
    const RowRange rows = band.queries(first_key, C.block_n);
    const RowRange rows_of_dout = p.dout == nullptr ? RowRange{0, 0, 0} : rows;
    const TileRange tiles = band.query_tiles(first_key, C.block_n);
    for (int m = tiles.begin; m < tiles.end; ++m) {
      const int row = m * C.block_m;
      load_q.load(sQ, row, rows);
      load_o.load(sO, row, rows_of_dout);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();  // the copies of all threads have landed
      compute_p_and_ds(head, m, rows);
      __syncthreads();  // all of P and dS is written
      // dV += P^T dO, dK += dS^T Q, dQ += dS K
      ProductV::template multiply<C.block_m / 16>(rV, Operand<C.block_m, C.block_n>::a_transposed(sP),
                                                  Operand<C.block_m, C.v_head_dim>::b_transposed(sO));
      ProductK::template multiply<C.block_m / 16>(rK, Operand<C.block_m, C.block_n>::a_transposed(sS),
                                                  Operand<C.block_m, C.head_dim>::b_transposed(sQ));
      accumulate_dq(head, row, rows);
      __syncthreads();  // all warps have read Q, dO, P and dS, which the next tile overwrites
    }
  }

  // S = Q K^T, P = exp(S - LSE), dP = dO V^T, dS = P (dP - delta), times the slope of the softcap.
  __device__ __forceinline__ void compute_p_and_ds(int head, int m, RowRange rows) {
    const int row = m * C.block_m + ProductS::row(), n = (first_key + ProductS::col()) / ProductS::kWarpCols;
    Scores tile(p.fwd, {m, head, batch}, seq, row);
    typename ProductS::Accumulator rP, rS, slope;  // rP: S, then P; rS: dP, then dS
    ProductS::clear(rP);
    ProductS::template multiply<C.head_dim / 16>(rP, Operand<C.block_m, C.head_dim>::a(sQ), Operand<C.block_n, C.head_dim>::b(sK));
    if constexpr (C.softcap) for_each([&](int b, int t, int e) { slope[b][t][e] = tile.score.cap_slope(rP[b][t][e]); });
    tile.apply_scale_and_bias(rP, n);
    if (tile.band.template needs_mask<ProductS::kWarpCols>(n)) tile.apply_mask(rP, n);

    float lse_log2[kBlocks][2], delta[kBlocks][2];
    read_rows(head, row, rows, lse_log2, delta);
    // An exponent is never positive, except for the rounding of huge scores.
    for_each([&](int b, int t, int e) {
      const float exponent = fmaf(rP[b][t][e], tile.score.factor, -lse_log2[b][e / 2]);
      rP[b][t][e] = ptx::exp2(exponent > 0.f ? 0.f : exponent);
    });

    ProductS::clear(rS);
    ProductS::template multiply<C.v_head_dim / 16>(rS, Operand<C.block_m, C.v_head_dim>::a(sO), Operand<C.block_n, C.v_head_dim>::b(sV));
    if constexpr (C.dropout) {
      for_each([&](int b, int t, int e) { rS[b][t][e] *= p.fwd.dropout_rescale; });
      // The sign of a probability says that it is dropped.
      tile.for_each_dropped(n, [&](int b, int t, int e) { rP[b][t][e] = -rP[b][t][e], rS[b][t][e] = 0.f; });
    }
    for_each([&](int b, int t, int e) {
      float& probability = rP[b][t][e];
      const float magnitude = C.dropout ? fabsf(probability) : probability;
      float ds = magnitude * (rS[b][t][e] - delta[b][e / 2]);
      if constexpr (C.softcap) ds *= slope[b][t][e];
      rS[b][t][e] = probability == 0.f ? 0.f : ds;  // a hidden element, whatever its dP is
      if (C.dropout && probability < 0.f) probability = 0.f;
    });
    write(sP, rP);
    write(sS, rS);
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

  // LSE in log2 units, and delta less dLSE, of this lane's rows. A row that sees no key has an LSE
  // of +inf here, so that its probabilities are 0.
  __device__ __forceinline__ void read_rows(int head, int first_row, RowRange rows, float (&lse_log2)[kBlocks][2],
                                            float (&delta)[kBlocks][2]) const {
    const int64_t at = batch * p.fwd.lse_batch_stride + head * p.fwd.lse_head_stride + seq.q_row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * b + 8 * r + lane_row();
        const float lse = rows.contains(row) ? p.fwd.lse[at + row] : negative_infinity();
        const bool idle = lse == negative_infinity();
        lse_log2[b][r] = idle ? -negative_infinity() : lse * kLog2e;
        delta[b][r] = idle ? 0.f : p.delta[at + row];
      }
  }

  // To 16 bits and shared memory.
  static __device__ __forceinline__ void write(uint32_t tile, const typename ProductS::Accumulator& x) {
    const int lane_first_row = ProductS::row() + lane_row(), first_chunk = ProductS::col() / 8;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < ProductS::kTiles; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t target = tile + TileP::offset(lane_first_row + 16 * b + 8 * r, first_chunk + t) + 2 * lane_col();
          ptx::store_shared_4(target, Traits::pack(x[b][t][2 * r], x[b][t][2 * r + 1]));
        }
  }

  // dQ += dS K, some columns at a time, by atomic additions of float32.
  __device__ __forceinline__ void accumulate_dq(int head, int first_row, RowRange rows) {
    const FwdParams& f = p.fwd;
    const int64_t token = static_cast<int64_t>(seq.batch) * f.seqlen_q + seq.q_row;
    const int lane_first_row = first_row + ProductQ::row() + lane_row(), lane_first_col = ProductQ::col() + lane_col();
#pragma unroll
    for (int chunk = 0; chunk < C.head_dim; chunk += kColsOfDq) {
      typename ProductQ::Accumulator rQ;
      ProductQ::clear(rQ);
      const auto read_k = Operand<C.block_n, C.head_dim>::b_transposed(sK);
      ProductQ::template multiply<C.block_n / 16>(rQ, Operand<C.block_m, C.block_n>::a(sS),
                                                  [&](uint32_t (&r)[4], int col, int k) { read_k(r, chunk + col, k); });
#pragma unroll
      for (int b = 0; b < ProductQ::kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = lane_first_row + 16 * b + 8 * r;
          if (!rows.contains(row)) continue;
          float* target = p.dq_sum + ((token + row) * f.heads + head) * f.head_dim;
#pragma unroll
          for (int t = 0; t < ProductQ::kTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int col = chunk + lane_first_col + 8 * t + e;
              if (C.exact_head_dim || col < f.head_dim) ptx::add_global(target + col, rQ[b][t][2 * r + e]);
            }
        }
    }
  }

  // dK or dV of this block's keys.
  template <class P>
  __device__ __forceinline__ void store(const typename P::Accumulator& x, void* gradient, const Strides& stride, int cols,
                                        float scale) const {
    auto* out = static_cast<uint16_t*>(gradient) + seq.batch * stride.batch + seq.k_row * stride.row + head_kv * stride.head;
    const int lane_first_key = first_key + P::row() + lane_row(), lane_first_col = P::col() + lane_col();
#pragma unroll
    for (int b = 0; b < P::kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = lane_first_key + 16 * b + 8 * r;
        if (key >= seq.length_k) continue;
#pragma unroll
        for (int t = 0; t < P::kTiles; ++t)
          store_pair<C>(out + key * stride.row, lane_first_col + 8 * t, cols,
                        Traits::pack(x[b][t][2 * r] * scale, x[b][t][2 * r + 1] * scale));
      }
  }
};

template <Config C>
__device__ __forceinline__ void fa2_backward(const BwdParams& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int pair = blockIdx.x / p.blocks_n, block_n = blockIdx.x - pair * p.blocks_n;
  const int batch = pair / p.heads_kv, head_kv = pair - batch * p.heads_kv;
  const Sequence seq = read_sequence<C.varlen>(p.fwd, batch);
  if (block_n * C.block_n < seq.length_k) Fa2Backward<C>(p, seq, block_n, head_kv, batch, ptx::shared_address(shared)).run();
}

}  // namespace fa
