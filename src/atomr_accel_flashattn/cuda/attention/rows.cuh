// The rows of one warp: scores, softmax state and output in registers, and everything that is done to them between the two products. Both
// kernel families have the same accumulator layout, so both use this.
#pragma once

#include "attention/dropout.cuh"
#include "attention/epilogue.cuh"
#include "attention/head_packing.cuh"
#include "attention/mask.cuh"
#include "attention/scheduler.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "tile/element.cuh"
#include "tile/warp.cuh"

namespace fa {

// kBlocks blocks of 16 rows. This lane holds rows lane / 4 and lane / 4 + 8 of each block, columns 2 * (lane % 4) and + 1 of each 8-column tile.
template <Config C, int kBlocks>
struct WarpRows {
  static constexpr int kRows = 16 * kBlocks;
  static constexpr int kKeyTiles = C.block_n / 8;
  static constexpr int kOutTiles = C.v_head_dim / 8;
  static_assert(!C.dropout || C.block_n % 32 == 0, "one Philox call covers 32 keys");
  using Type = Element<C.dtype>;

  const FwdParams& p;
  const Work work;
  const Sequence seq;
  const int first_row;  // inside the sequence
  const Band<C> band;
  const Score<C> score;

  using Scores = float[kBlocks][kKeyTiles][4];

  float rO[kBlocks][kOutTiles][4];
  float rescale[kBlocks][2];  // of rO: to a new maximum, and at the end to its denominator
  OnlineSoftmax<kBlocks> softmax;

  // On one side of the diagonal ALiBi is linear: scores take what differs inside a row of a tile, references the rest. Two blocks have no
  // registers for that.
  static constexpr bool kShifts = C.alibi && !Score<C>::kInLog2 && kBlocks == 1;
  float shift[kBlocks][2];  // kShifts: what scores of the tile at hand still lack

  bool in_series = false;     // Score::kHasSeries: whether the tile at hand takes the series,
  float series_bound = -1.f;  // and up to which |s| the rows of this lane may: no tile before the first maximum

  __device__ __forceinline__ WarpRows(const FwdParams& params, const Work& w, const Sequence& s, int row)
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

  // Raw products of tile n become scores: scale, bias, mask. Those that take the series stay raw.
  __device__ __forceinline__ void finish_scores(Scores& rS, int n) {
    if constexpr (Score<C>::kHasSeries) in_series = !band.cuts(n) && !__any_sync(0xffffffffu, largest(rS) > series_bound);
    if (!in_series) transform_scores(rS, n);
    if (band.cuts(n)) hide_keys(rS, n);
  }

  // Scores of tile n become unnormalised probabilities. Returns whether rescale_output() has anything to do.
  __device__ __forceinline__ bool softmax_tile(Scores& rS, int n) {
    bool grew = false;
    if (Score<C>::kHasSeries && in_series) {
      softmax.template accumulate<false>(rS, shift, [this](float s, float reference) { return score.series(s, reference); });
    } else {
      grew = softmax.template update<kShifts>(rS, shift, rescale, score.factor);
      if constexpr (Score<C>::kHasSeries) bound_series();
    }
    if constexpr (C.dropout) drop(rS, n);
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

  // Two neighbouring accumulator tiles of P, packed, are the A operand of one k step of P V.
  static __device__ __forceinline__ void pack_probabilities(uint32_t (&a)[4], const Scores& rS, int b, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Type::pack(rS[b][2 * k + i / 2][i % 2 * 2], rS[b][2 * k + i / 2][i % 2 * 2 + 1]);
  }

  // Denominators and, where wanted, LSE. Needs no output, so it may run beside the last product.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_at(b, r), head = head_of<C>(p, work.head, row);
        const bool exists = row < row_count<C>(p, seq);
        const float sink = C.learned_sink && exists ? p.learned_sink[head] * kLog2e : 0.f;
        const float sum = quad_reduce(softmax.sum[b][r], [](float x, float y) { return x + y; });
        const RowEnd end = finish_row<C>(sum, softmax.max[b][r] * score.factor, sink);
        if (p.lse != nullptr && lane_col() == 0 && exists) {
          p.lse[work.batch * p.lse_batch_stride + head * p.lse_head_stride + seq.q_row + query_of<C>(p, row)] = end.lse;
        }
        rescale[b][r] = C.dropout ? end.scale * p.dropout_rescale : end.scale;
      }
  }

  // Write O, normalised as finish() found. All words are exchanged before the first is stored: a branch between would make every exchange wait for
  // the one before it (1700 clocks a tile at 128 columns instead of 1200).
  __device__ __forceinline__ void store() {
    auto* out = static_cast<uint16_t*>(p.o) + seq.batch * p.o_stride.batch + seq.q_row * p.o_stride.row;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t w[2][kOutTiles / 4][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          w[r][t / 4][t % 4] = Type::pack(rO[b][t][2 * r] * rescale[b][r], rO[b][t][2 * r + 1] * rescale[b][r]);
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

  // From a row to this lane's first key of tile n.
  __device__ __forceinline__ float distance(int b, int r, int n) const {
    return static_cast<float>(n * C.block_n + lane_col() - position(b, r));
  }

  __device__ __forceinline__ void transform_scores(Scores& rS, int n) {
    if constexpr (kShifts) {
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
          shift[b][r] = 0.f;
#pragma unroll
          for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              rS[b][t][2 * r + e] = score.apply(rS[b][t][2 * r + e], first + static_cast<float>(8 * t + e));
            }
        }
    }
  }

  // ALiBi where all visible keys are on one side of the diagonal: one instruction an element, where distances take two.
  __device__ __forceinline__ void apply_linear_bias(Scores& rS, int n, float slope) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shift[b][r] = slope * distance(b, r, n);
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) rS[b][t][2 * r + e] = fmaf(slope, static_cast<float>(8 * t + e), rS[b][t][2 * r + e]);
      }
  }

  // Of packed sequences, the rows past the end are the next sequence's, which shall change nothing here.
  __device__ __forceinline__ bool decides(int b, int r) const { return !C.varlen || row_at(b, r) < row_count<C>(p, seq); }

  __device__ __forceinline__ float largest(const Scores& rS) const {
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

  // Scores of the series are no maxima: none may pass the lowest reference by too much. Capped, they are no larger.
  __device__ __forceinline__ void bound_series() {
    float lowest = -negative_infinity();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (decides(b, r)) lowest = fminf(lowest, softmax.max[b][r]);
    series_bound = fminf(p.softcap_limit, (lowest + OnlineSoftmax<kBlocks>::kLargestGrowth) / score.scale);
  }

  __device__ __forceinline__ void hide_keys(Scores& rS, int n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = band.row(position(b, r), n * C.block_n + lane_col());
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (row.hides(8 * t + e)) rS[b][t][2 * r + e] = negative_infinity();
          }
      }
  }

  __device__ __forceinline__ void drop(Scores& rS, int n) {
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
