// SPDX-License-Identifier: Apache-2.0
// Rows of one warp in the forward: a tile of scores, softmax state and output in registers, and
// everything between the two products (bias, mask, softmax, dropout) and after them (normalise,
// store).
#pragma once

#include "attention/epilogue.cuh"
#include "attention/score_tile.cuh"

namespace fa {

// kBlocks blocks of 16 rows.
template <Config C, int kBlocks>
struct WarpRows : ScoreTile<C, kBlocks> {
  using Tile = ScoreTile<C, kBlocks>;
  using Tile::apply_scale_and_bias, Tile::apply_mask, Tile::apply_dropout, Tile::hide_absent;
  using Tile::clear, Tile::row_at, Tile::lane_col, Tile::decides;
  using Tile::kRows, Tile::kKeyTiles, Tile::kFoldsBias;
  using Tile::p, Tile::work, Tile::seq, Tile::first_row, Tile::band, Tile::score, Tile::row_bias;
  using typename Tile::Scores;
  static constexpr int kOutTiles = C.v_head_dim / 8, kTilesOfO = C.o_width() / 8;

  float rO[kBlocks][kTilesOfO][4];  // behind those of V, with sum_columns: the sum of P of each row
  float rescale[kBlocks][2];        // factor of rO: for a new maximum, in the end to normalise
  OnlineSoftmax<kBlocks, ProbabilityRange<C.p_dtype()>> softmax;

  // Polynomial softcap (Score::kHasPolynomial): whether this tile takes it, and up to which |s| the
  // rows of this lane may; -1: not before the first maximum.
  bool use_polynomial = false;
  float polynomial_limit = -1.f;

  __device__ __forceinline__ WarpRows(const FwdParams& params, const WorkTile& w, const Sequence& s, int row, float descale = 1.f)
      : Tile(params, w, s, row, descale) {
    clear(rO);
  }

  // Scale, bias and mask of tile n. Scores that take the polynomial softcap stay raw.
  template <bool kHasHoles = false>
  __device__ __forceinline__ void apply_bias_and_mask(Scores& rS, int n, const KeysThere<kHasHoles>& keys = {}) {
    if constexpr (Score<C>::kHasPolynomial)
      use_polynomial = !band.needs_mask(n) && !__any_sync(0xffffffffu, largest_magnitude(rS) > polynomial_limit);
    if constexpr (kHasHoles) use_polynomial &= keys.all();
    if (!use_polynomial) apply_scale_and_bias(rS, n);
    if (band.needs_mask(n) || !keys.all()) {
      apply_mask(rS, n);
      if constexpr (kHasHoles) hide_absent(rS, keys.there);
    }
  }

  // Scores of tile n to unnormalised probabilities, with dropout. Returns whether rescale_output()
  // is due, as OnlineSoftmax::update().
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
      for (int t = 0; t < kTilesOfO; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[b][t][e] *= rescale[b][e / 2];
  }

  // Normalisation factors, and LSE if wanted. Reads no output: it may overlap the last PV product.
  // `lse()` is where the LSE goes, null for nowhere; split: where the PartialSum goes. `descale`:
  // of v, fp8 only.
  template <class Lse>
  __device__ __forceinline__ void finalize(Lse lse, float descale = 1.f) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r), head = head_of<C>(p, work.head, row);
        const bool exists = row < row_count<C>(p, seq);
        const float sink = C.learned_sink && exists ? p.learned_sink[head] * kLog2e : 0.f;
        const float sum = quad_reduce(softmax.sum[b][r], [](float x, float y) { return x + y; });
        const RowResult end = finalize_row<C>(sum, softmax.reference_log2(b, r, score.factor), sink);
        if (lse() != nullptr && lane_col() == 0 && exists) {
          lse()[work.batch * p.lse_batch_stride + head * p.lse_head_stride + seq.q_row + query_of<C>(p, row)] =
              lse_or_parts(end.lse, b, r, sum);
        }
        if constexpr (C.sum_columns > 0) softmax.sum[b][r] = sum;
        rescale[b][r] = C.dropout ? end.scale * p.dropout_rescale : Score<C>::kDescaled ? end.scale * descale : end.scale;
      }
  }

  // With sum_columns, after finalize(), once O is complete: it is divided by the sum of P as it was
  // rounded instead, so that what rounding adds to all of them cancels. The LSE has the sum before.
  __device__ __forceinline__ void normalise_by_sum_columns() {
    if constexpr (C.sum_columns > 0) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (softmax.sum[b][r] != 0.f) rescale[b][r] *= softmax.sum[b][r] * ptx::reciprocal(rO[b][kOutTiles][2 * r]);
    }
  }

  // Of an LSE.
  __device__ __forceinline__ int64_t lse_row(int head, int row) const {
    return work.batch * p.lse_batch_stride + head * p.lse_head_stride + seq.q_row + query_of<C>(p, row);
  }

  // Normalise and store a partial O in float32, rows in the order of the LSE.
  __device__ __forceinline__ void store_partial(float* partial) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r);
        if (row >= row_count<C>(p, seq)) continue;
        float* target = partial + lse_row(head_of<C>(p, work.head, row), row) * p.v_head_dim;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          const int col = 8 * t + lane_col();
          if (C.exact_head_dim || col < p.v_head_dim)
            *reinterpret_cast<float2*>(target + col) = {rO[b][t][2 * r] * rescale[b][r], rO[b][t][2 * r + 1] * rescale[b][r]};
        }
      }
  }

  // Normalise and store O. All shuffles come before the first store: a branch between would
  // serialise them (1700 clocks a tile at 128 columns instead of 1200).
  __device__ __forceinline__ void store() {
    if constexpr (C.out_dtype == DType::F32) return store_float32();
    auto* out = static_cast<uint16_t*>(p.o) + seq.batch * p.o_stride.batch + seq.q_row * p.o_stride.row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t w[2][kOutTiles / 4][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          w[r][t / 4][t % 4] = MmaTraits<C.out_dtype>::pack(rO[b][t][2 * r] * rescale[b][r], rO[b][t][2 * r + 1] * rescale[b][r]);
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
  __device__ __forceinline__ void store_float32() {
    float* out = static_cast<float*>(p.o) + seq.batch * p.o_stride.batch + seq.q_row * p.o_stride.row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r);
        if (row >= row_count<C>(p, seq)) continue;
        float* target = out + query_of<C>(p, row) * p.o_stride.row + head_of<C>(p, work.head, row) * p.o_stride.head + lane_col();
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          if (C.exact_head_dim || 8 * t + lane_col() < p.v_head_dim)
            *reinterpret_cast<float2*>(target + 8 * t) = {rO[b][t][2 * r] * rescale[b][r], rO[b][t][2 * r + 1] * rescale[b][r]};
        }
      }
  }

  __device__ __forceinline__ auto lse_or_parts(float lse, int b, int r, float sum) const {
    if constexpr (C.split) {
      return PartialSum{softmax.reference_log2(b, r, score.factor), sum};
    } else {
      return lse;
    }
  }

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
    polynomial_limit = fminf(p.softcap_limit, (lowest + decltype(softmax)::kOverflowThreshold) / score.scale);
  }
};

}  // namespace fa
