// SPDX-License-Identifier: Apache-2.0
// The backward for narrow heads: S and dP transposed, so that P and dS are operands of dV and dK as
// they are.
//
// A warp owns 32 keys, with V as an operand in registers, and takes 16 queries at a time: the
// accumulators of S^T = K Q^T and dP^T = V dO^T, as P^T and dS^T, are the A operands of
// dV += P^T dO and dK += dS^T Q. Only dS goes to shared memory, for dQ += dS K. Reads of shared
// memory bound products that go through it. With K in registers too, more would spill.
#pragma once

#include "attention/backward_block.cuh"

namespace fa {

template <Config C>
constexpr bool kNarrow = C.block_n == 32 * C.warps && C.stages == 3 && C.head_dim <= 64 && C.v_head_dim <= 64 && !C.softcap && !C.dropout;

template <Config C>
struct Fa2BackwardNarrow : BackwardBlock<C> {
  using Base = BackwardBlock<C>;
  using Base::kStages, Base::kStageBytes, Base::p, Base::seq, Base::batch, Base::first_key, Base::tiles, Base::next;
  using Base::lane_row, Base::lane_col;
  using typename Base::QueryTile, typename Base::TileQ, typename Base::TileK, typename Base::Traits;
  static_assert(kNarrow<C> && Base::kColsOfDq == C.head_dim);

  using ProductK = WarpProduct<C.dtype, C.block_n, C.head_dim, C.warps, C.warps>;
  using ProductV = WarpProduct<C.dtype, C.block_n, C.v_head_dim, C.warps, C.warps>;
  using TileS = SharedTile<C.block_n, C.block_m>;  // dS^T
  static constexpr int kBlocks = 2;                // of 16 keys
  using Slice = float[kBlocks][2][4];              // 32 keys, 16 queries

  // Of shared memory. V lies in the two buffers of dS at first.
  static constexpr int kBuffers = 2 * TileS::kBytes > Base::TileV::kBytes ? 2 * TileS::kBytes : Base::TileV::kBytes;
  static constexpr int kBytes = TileK::kBytes + kStages * kStageBytes + kBuffers;
  const uint32_t sK, sQ, sS;

  typename ProductK::Accumulator rK;  // dK, dV
  typename ProductV::Accumulator rV;
  uint32_t v_operand[C.v_head_dim / 16][kBlocks][4];

  __device__ __forceinline__ Fa2BackwardNarrow(const BwdParams& params, const Sequence& s, int block_n, int heads, int sequence,
                                               uint32_t shared)
      : Base(params, s, block_n, heads, sequence), sK(shared), sQ(sK + TileK::kBytes), sS(sQ + kStages * kStageBytes) {}

  __device__ __forceinline__ void run() {
    this->load_keys(sK, sS);
    ProductK::clear(rK);
    ProductV::clear(rV);
    if (tiles.begin < tiles.end) mainloop();
    ptx::cp_async_wait<0>();
    this->template store_dk_and_dv<ProductK, ProductV>(rK, rV);
  }

 private:
  __device__ __forceinline__ uint32_t at(int stage) const { return sQ + stage * kStageBytes; }

  // Algorithm 2, lines 10 to 17, over the tiles of queries of one head after the other. One barrier
  // a tile: warps that are ahead write the other buffer of dS.
  __device__ __forceinline__ void mainloop() {
    QueryTile tile = this->ahead, added = {-1, 0};
    int stage = 0, buffer = 0;
    bool ready = !C.deterministic || threadIdx.x != Base::kThreads - 1;
    this->load_next(at(0));
    this->load_next(at(1));
    ptx::cp_async_wait<1>();
    __syncthreads();
    const auto read_v = Operand<C.block_n, C.v_head_dim>::a(sS);
#pragma unroll
    for (int k = 0; k < C.v_head_dim / 16; ++k)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) read_v(v_operand[k][b], ProductV::row() + 16 * b, k);
    __syncthreads();  // all warps have read V, which dS overwrites
    for (; tile.head < this->end_head(); this->advance(tile)) {
      const uint32_t ds = sS + buffer * TileS::kBytes;
      if (is_special(tile, at(stage))) {
        add_tile<true>(tile, at(stage), ds);
      } else {
        add_tile<false>(tile, at(stage), ds);
      }
      ptx::cp_async_wait<0>();
      this->wait_for_turn(tile, ready);
      __syncthreads();  // dS is complete, and the next tile has landed
      ready = this->take_turns(added, tile);
      this->load_next(at(next(stage, 2)));
      typename Base::DqPart part;
      this->compute_dq(part, tile, Operand<C.block_n, C.block_m>::a_transposed(ds), sK, 0);
      this->add_dq(part, 0, Base::kFragments);
      stage = next(stage), buffer ^= 1;
    }
    if constexpr (C.deterministic) __syncthreads();
    this->pass_turn(added);
  }

  // Whether a row does not see some key of the warp, or has huge scores.
  __device__ __forceinline__ bool is_special(const QueryTile& query, uint32_t stage) const {
    const Band<C> tile_band(p.fwd, seq, query.m * C.block_m, C.block_m);
    bool special = tile_band.template needs_mask<32>((first_key + ProductK::row()) / 32);
#pragma unroll
    for (int row = 0; row < C.block_m; row += 32) {
      float lse_log2, delta;
      ptx::load_shared_8(lse_log2, delta, this->statistics_at(stage, row + threadIdx.x % 32));
      special |= fabsf(lse_log2) > OnlineSoftmax<1>::kLargestFused;
    }
    return __any_sync(0xffffffffu, special);
  }

  template <bool kSpecial>
  __device__ __forceinline__ void add_tile(const QueryTile& query, uint32_t stage, uint32_t ds) {
#pragma unroll 1
    for (int slice = 0; slice < C.block_m / 16; ++slice) add_slice<kSpecial>(query, stage, ds, slice);
  }

  // 16 queries: S^T = K Q^T, P = exp(S - LSE), dP^T = V dO^T, dS = P (dP - delta), dV += P^T dO,
  // dK += dS^T Q. What is not a product hides behind one.
  template <bool kSpecial>
  __device__ __forceinline__ void add_slice(const QueryTile& query, uint32_t stage, uint32_t ds, int slice) {
    const uint32_t dout = stage + TileQ::kBytes;
    const int first = first_key + ProductK::row();
    const Band<C> slice_band(p.fwd, seq, query.m * C.block_m + 16 * slice, 16);
    const Score<C> score(p.fwd, batch, query.head);
    float lse_log2[2][2], delta[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float4 pair = ptx::load_shared_16_floats(this->statistics_at(stage, 16 * slice + 8 * t + lane_col()));
      lse_log2[t][0] = pair.x, delta[t][0] = pair.y, lse_log2[t][1] = pair.z, delta[t][1] = pair.w;
    }
    Slice rP, rS;  // rP: S^T, then P^T; rS: dP^T, then dS^T
    const auto read_k = Operand<C.block_n, C.head_dim>::a(sK);
    multiply<C.head_dim / 16>(
        rP, [&](uint32_t (&a)[4], int b, int k) { read_k(a, ProductK::row() + 16 * b, k); }, Operand<C.block_m, C.head_dim>::b(stage),
        slice);
    if constexpr (C.alibi || Score<C>::kInLog2)
      for_each([&](int b, int t, int e) {
        const int distance = first + 16 * b + 8 * (e / 2) + lane_row() - (slice_band.p_first + 8 * t + lane_col() + e % 2);
        rP[b][t][e] = score.apply(rP[b][t][e], static_cast<float>(distance));
      });
    if constexpr (kSpecial) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto column = slice_band.column(first + 16 * b + 8 * r + lane_row(), slice_band.p_first + lane_col());
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (column.masks(8 * t + e)) rP[b][t][2 * r + e] = negative_infinity();
        }
    }
    for_each([&](int b, int t, int e) {
      const float exponent = fmaf(rP[b][t][e], score.factor, -lse_log2[t][e % 2]);
      // Never positive, except for the rounding of huge scores.
      rP[b][t][e] = ptx::exp2(kSpecial && exponent > 0.f ? 0.f : exponent);
    });
    multiply<C.v_head_dim / 16>(
        rS,
        [&](uint32_t (&a)[4], int b, int k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = v_operand[k][b][i];
        },
        Operand<C.block_m, C.v_head_dim>::b(dout), slice);

    uint32_t a[kBlocks][4];
    pack(a, rP);
    add<ProductV>(rV, a, Operand<C.block_m, C.v_head_dim>::b_transposed(dout), slice);
    for_each([&](int b, int t, int e) {
      const float ds = rP[b][t][e] * (rS[b][t][e] - delta[t][e % 2]);
      // A hidden element, whatever its dP is.
      rS[b][t][e] = kSpecial && rP[b][t][e] == 0.f ? 0.f : ds;
    });
    pack(a, rS);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ptx::store_shared_4(ds + TileS::offset(ProductK::row() + 16 * b + 8 * (i % 2) + lane_row(), 2 * slice + i / 2) + 2 * lane_col(),
                            a[b][i]);
    add<ProductK>(rK, a, Operand<C.block_m, C.head_dim>::b_transposed(stage), slice);
  }

  template <class Visit>
  static __device__ __forceinline__ void for_each(Visit visit) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) visit(b, t, e);
  }

  // x = A B^T.
  template <int kSteps, class ReadA, class ReadB>
  static __device__ __forceinline__ void multiply(Slice& x, ReadA read_a, ReadB read_b, int slice) {
    for_each([&](int b, int t, int e) { x[b][t][e] = 0.f; });
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t q[4];
      read_b(q, 16 * slice, k);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t a[4];
        read_a(a, b, k);
        Traits::mma(x[b][0], a, q[0], q[1]);
        Traits::mma(x[b][1], a, q[2], q[3]);
      }
    }
  }

  // To 16 bits, as the A operand of one k step.
  static __device__ __forceinline__ void pack(uint32_t (&a)[kBlocks][4], const Slice& x) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[b][i] = Traits::pack(x[b][i / 2][i % 2 * 2], x[b][i / 2][i % 2 * 2 + 1]);
  }

  // x += A B, one k step.
  template <class P, class Read>
  static __device__ __forceinline__ void add(typename P::Accumulator& x, const uint32_t (&a)[kBlocks][4], Read read, int slice) {
#pragma unroll
    for (int t = 0; t < P::kTiles; t += 2) {
      uint32_t b[4];
      read(b, 8 * t, slice);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        Traits::mma(x[i][t], a[i], b[0], b[1]);
        Traits::mma(x[i][t + 1], a[i], b[2], b[3]);
      }
    }
  }
};

}  // namespace fa
