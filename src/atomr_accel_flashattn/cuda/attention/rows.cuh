// SPDX-License-Identifier: Apache-2.0
// Rows of one warp: softmax state and output in registers, and everything between the two products
// (bias, mask, softmax, dropout) and after them (normalise, store). mma.sync and wgmma have the
// same accumulator layout, so both kernel families use this.
#pragma once

#include "attention/dropout.cuh"
#include "attention/epilogue.cuh"
#include "attention/head_packing.cuh"
#include "attention/mask.cuh"
#include "attention/scheduler.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

// kBlocks blocks of 16 rows. This lane holds rows lane / 4 and lane / 4 + 8 of each block, columns
// 2 * (lane % 4) and + 1 of each 8-column tile.
template <Config C, int kBlocks>
struct WarpRows {
  static constexpr int kRows = 16 * kBlocks;
  static constexpr int kKeyTiles = C.block_n / 8;
  static constexpr int kOutTiles = C.v_head_dim / 8;
  static_assert(!C.dropout || C.block_n % 32 == 0, "one Philox call covers 32 keys");
  using Traits = MmaTraits<C.dtype>;

  const FwdParams& p;
  const WorkTile work;
  const Sequence seq;
  const int first_row;  // inside the sequence
  const Band<C> band;
  const Score<C> score;

  using Scores = float[kBlocks][kKeyTiles][4];

  float rO[kBlocks][kOutTiles][4];
  float rescale[kBlocks][2];  // factor of rO: for a new maximum, and in the end the normalisation
  OnlineSoftmax<kBlocks> softmax;

  // ALiBi is linear on either side of the diagonal: scores take the part that differs along a row
  // of a tile, and the rest is folded into the maximum. Two blocks have no registers for it.
  static constexpr bool kFoldsBias = C.alibi && !Score<C>::kInLog2 && kBlocks == 1;
  float row_bias[kBlocks][2];  // kFoldsBias: per-row bias not yet added to the scores of this tile

  // Polynomial softcap (Score::kHasPolynomial): whether this tile takes it, and up to which |s| the
  // rows of this lane may; -1: not before the first maximum.
  bool use_polynomial = false;
  float polynomial_limit = -1.f;

  __device__ __forceinline__ WarpRows(const FwdParams& params, const WorkTile& w, const Sequence& s, int row)
      : p(params), work(w), seq(s), first_row(row), band(params, s, row, kRows), score(params, w.batch, w.head) {
    clear(rO);
  }

  template <int kTiles>
  static __device__ __forceinline__ void clear(float (&x)[kBlocks][kTiles][4]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[b][t][e] = 0.f;
  }

  // Scale, bias and mask of tile n. Scores that take the polynomial softcap stay raw.
  __device__ __forceinline__ void apply_bias_and_mask(Scores& rS, int n) {
    if constexpr (Score<C>::kHasPolynomial)
      use_polynomial = !band.needs_mask(n) && !__any_sync(0xffffffffu, largest_magnitude(rS) > polynomial_limit);
    if (!use_polynomial) apply_scale_and_bias(rS, n);
    if (band.needs_mask(n)) apply_mask(rS, n);
  }

  // Scores of tile n to unnormalised probabilities, with dropout. Returns whether rescale_output()
  // is due.
  __device__ __forceinline__ bool online_softmax(Scores& rS, int n) {
    bool grew = false;
    if (Score<C>::kHasPolynomial && use_polynomial) {
      softmax.template accumulate<false>(rS, row_bias, false, [this](float s, float reference) { return score.polynomial(s, reference); });
    } else {
      grew = softmax.template update<kFoldsBias>(rS, row_bias, rescale, score.factor, [this](int b, int r) { return decides(b, r); });
      if constexpr (Score<C>::kHasPolynomial) update_polynomial_limit();
    }
    if constexpr (C.dropout) apply_dropout(rS, n);
    return grew;
  }

  __device__ __forceinline__ void rescale_output() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[b][t][e] *= rescale[b][e / 2];
  }

  // P to 16 bits: two neighbouring accumulator tiles are the A operand of one k step of P V.
  static __device__ __forceinline__ void pack_probabilities(uint32_t (&a)[4], const Scores& rS, int b, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Traits::pack(rS[b][2 * k + i / 2][i % 2 * 2], rS[b][2 * k + i / 2][i % 2 * 2 + 1]);
  }

  // Normalisation factors, and LSE if wanted. Reads no output: it may overlap the last PV product.
  __device__ __forceinline__ void finalize() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r), head = head_of<C>(p, work.head, row);
        const bool exists = row < row_count<C>(p, seq);
        const float sink = C.learned_sink && exists ? p.learned_sink[head] * kLog2e : 0.f;
        const float sum = quad_reduce(softmax.sum[b][r], [](float x, float y) { return x + y; });
        const RowResult end = finalize_row<C>(sum, softmax.max[b][r] * score.factor, sink);
        if (p.lse != nullptr && lane_col() == 0 && exists) {
          p.lse[work.batch * p.lse_batch_stride + head * p.lse_head_stride + seq.q_row + query_of<C>(p, row)] = end.lse;
        }
        rescale[b][r] = C.dropout ? end.scale * p.dropout_rescale : end.scale;
      }
  }

  // Normalise and store O. All shuffles come before the first store: a branch between would
  // serialise them (1700 clocks a tile at 128 columns instead of 1200).
  __device__ __forceinline__ void store() {
    auto* out = static_cast<uint16_t*>(p.o) + seq.batch * p.o_stride.batch + seq.q_row * p.o_stride.row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t w[2][kOutTiles / 4][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          w[r][t / 4][t % 4] = Traits::pack(rO[b][t][2 * r] * rescale[b][r], rO[b][t][2 * r + 1] * rescale[b][r]);
#pragma unroll
      for (int i = 0; i < kOutTiles / 2; ++i) transpose_quad(w[i % 2][i / 2]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r);
        if (row >= row_count<C>(p, seq)) continue;
        auto* target = out + query_of<C>(p, row) * p.o_stride.row + head_of<C>(p, work.head, row) * p.o_stride.head;
#pragma unroll
        for (int i = 0; i < kOutTiles / 4; ++i) store_quad<C>(target, 32 * i, p.v_head_dim, w[r][i]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int lane_col() { return static_cast<int>(threadIdx.x) % 4 * 2; }
  __device__ __forceinline__ int row_at(int b, int r) const { return first_row + 16 * b + 8 * r + lane_row(); }
  __device__ __forceinline__ int position(int b, int r) const {
    return C.pack_gqa ? query_of<C>(p, row_at(b, r)) + (seq.length_k - seq.length_q) : band.p_first + 16 * b + 8 * r + lane_row();
  }

  // j - p from a row to this lane's first key of tile n.
  __device__ __forceinline__ float distance(int b, int r, int n) const {
    return static_cast<float>(n * C.block_n + lane_col() - position(b, r));
  }

  __device__ __forceinline__ void apply_scale_and_bias(Scores& rS, int n) {
    if constexpr (kFoldsBias) {
      const bool before = n * C.block_n + C.block_n - 1 <= band.p_first || (C.right_bound && p.window_right <= 0);
      const bool after = n * C.block_n >= band.p_last;
      if (before || after) return apply_linear_bias(rS, n, before ? score.slope : -score.slope);
    }
    if constexpr (C.alibi || Score<C>::kInLog2) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float first = distance(b, r, n);
          row_bias[b][r] = 0.f;
#pragma unroll
          for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              rS[b][t][2 * r + e] = score.apply(rS[b][t][2 * r + e], first + static_cast<float>(8 * t + e));
            }
        }
    }
  }

  // ALiBi with all visible keys on one side of the diagonal: one instruction an element instead of
  // two.
  __device__ __forceinline__ void apply_linear_bias(Scores& rS, int n, float slope) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        row_bias[b][r] = slope * distance(b, r, n);
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) rS[b][t][2 * r + e] = fmaf(slope, static_cast<float>(8 * t + e), rS[b][t][2 * r + e]);
      }
  }

  // In packed sequences, rows past the end belong to the next sequence and must have no influence.
  __device__ __forceinline__ bool decides(int b, int r) const { return !C.varlen || row_at(b, r) < row_count<C>(p, seq); }

  __device__ __forceinline__ float largest_magnitude(const Scores& rS) const {
    float magnitude = 0.f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float of_row = 0.f;
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t) of_row = fmaxf(of_row, fmaxf(fabsf(rS[b][t][2 * r]), fabsf(rS[b][t][2 * r + 1])));
        if (decides(b, r)) magnitude = fmaxf(magnitude, of_row);
      }
    return magnitude;
  }

  // The polynomial takes no maximum, so no score may exceed the lowest reference by more than f16
  // holds. It is enough to bound raw scores: the cap makes none larger.
  __device__ __forceinline__ void update_polynomial_limit() {
    float lowest = -negative_infinity();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (decides(b, r)) lowest = fminf(lowest, softmax.max[b][r]);
    polynomial_limit = fminf(p.softcap_limit, (lowest + OnlineSoftmax<kBlocks>::kOverflowThreshold) / score.scale);
  }

  __device__ __forceinline__ void apply_mask(Scores& rS, int n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = band.row(position(b, r), n * C.block_n + lane_col());
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (row.masks(8 * t + e)) rS[b][t][2 * r + e] = negative_infinity();
          }
      }
  }

  __device__ __forceinline__ void apply_dropout(Scores& rS, int n) {
    const Philox philox(p.rng);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kKeyTiles; t += 4) {
        const uint32_t row_group = (first_row / 16 + b) * 8 + lane_row();
        const uint32_t key_group = (n * C.block_n / 32 + t / 4) * 4 + threadIdx.x % 4;
        const DropoutBytes bytes = {philox(row_group, key_group, work.batch * p.heads + work.head)};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int r = i / 8, tile = i / 2 % 4, e = i % 2;
          if (bytes.at(r, tile, e) >= p.dropout_threshold) rS[b][t + tile][2 * r + e] = 0.f;
        }
      }
  }
};

}  // namespace fa
