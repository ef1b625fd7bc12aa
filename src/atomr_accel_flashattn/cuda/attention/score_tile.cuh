// SPDX-License-Identifier: Apache-2.0
// A tile of scores in the registers of a warp: what happens to S = Q K^T before the exponential
// (scale, bias, mask) and to P after it (dropout). It owns no accumulator of an output, so that the
// forward and the backward share it. mma.sync and wgmma have the same accumulator layout.
#pragma once

#include "attention/dropout.cuh"
#include "attention/head_packing.cuh"
#include "attention/mask.cuh"
#include "attention/scheduler.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

// Which keys of a tile there are.
template <bool kHasHoles>
struct KeysThere {
  __device__ __forceinline__ bool all() const { return true; }
};
template <>
struct KeysThere<true> {
  uint32_t there;  // bit i is that of keys 8 i .. 8 i + 7
  __device__ __forceinline__ bool all() const { return there == 0xffffffffu; }
};

// kBlocks blocks of 16 queries, kKeys keys: tile n of that width. This lane holds rows lane / 4 and
// lane / 4 + 8 of each block, columns 2 * (lane % 4) and + 1 of each 8-column tile.
// kMayFold: the caller adds row_bias where apply_scale_and_bias() left it out.
template <Config C, int kBlocks, int kKeys = C.block_n, bool kMayFold = true>
struct ScoreTile {
  static constexpr int kRows = 16 * kBlocks;
  static constexpr int kKeyTiles = kKeys / 8;
  static_assert(!C.dropout || kKeys % 32 == 0 || kKeys == 16, "one Philox call covers 32 keys");

  const FwdParams& p;
  const WorkTile work;
  const Sequence seq;
  const int first_row;  // inside the sequence
  const Band<C> band;
  const Score<C> score;

  using Scores = float[kBlocks][kKeyTiles][4];

  // ALiBi is linear on either side of the diagonal: scores take the part that differs along a row
  // of a tile, and the rest is folded into the maximum. Two blocks have no registers for it.
  static constexpr bool kFoldsBias = kMayFold && C.alibi && !C.any_ratio && !Score<C>::kInLog2 && kBlocks == 1;
  float row_bias[kBlocks][2];  // kFoldsBias: per-row bias not yet added to the scores of this tile

  __device__ __forceinline__ ScoreTile(const FwdParams& params, const WorkTile& w, const Sequence& s, int row, float descale = 1.f)
      : p(params), work(w), seq(s), first_row(row), band(params, s, row, kRows), score(params, w.batch, w.head, descale) {}

  template <int kTiles>
  static __device__ __forceinline__ void clear(float (&x)[kBlocks][kTiles][4]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[b][t][e] = 0.f;
  }

  // P to its type: two neighbouring accumulator tiles are the A operand of one k step of P V. In
  // fp8 they are four, and a step has its keys in the order of ByteTranspose (tile/transpose.cuh).
  static __device__ __forceinline__ void pack_probabilities(uint32_t (&a)[4], const Scores& rS, int b, int k) {
    using Traits = MmaTraits<C.p_dtype()>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = 2 * k + i / 2, e = i % 2 * 2;
      if constexpr (Traits::kIsFp8) {
        const auto pair = [&](int tile) { return Traits::pack(rS[b][tile][e], rS[b][tile][e + 1]); };
        a[i] = pair(2 * t) | pair(2 * t + 1) << 16;
      } else {
        a[i] = Traits::pack(rS[b][t][e], rS[b][t][e + 1]);
      }
    }
  }

  static __device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int lane_col() { return static_cast<int>(threadIdx.x) % 4 * 2; }
  __device__ __forceinline__ int row_at(int b, int r) const { return first_row + 16 * b + 8 * r + lane_row(); }
  __device__ __forceinline__ int position(int b, int r) const {
    return C.pack_gqa ? query_of<C>(p, row_at(b, r)) + (seq.length_k - seq.length_q) : band.p_first + 16 * b + 8 * r + lane_row();
  }

  __device__ __forceinline__ float slope_at(int b, int r) const {
    if constexpr (C.alibi && C.any_ratio) {
      const int row = row_at(b, r);
      return row < row_count<C>(p, seq) ? Score<C>::slope_of(p, work.batch, head_of<C>(p, work.head, row)) : 0.f;
    }
    return score.slope;
  }

  // j - p from a row to this lane's first key of tile n.
  __device__ __forceinline__ float distance(int b, int r, int n) const {
    return static_cast<float>(n * kKeys + lane_col() - position(b, r));
  }

  __device__ __forceinline__ void apply_scale_and_bias(Scores& rS, int n) {
    if constexpr (kFoldsBias) {
      const bool before = n * kKeys + kKeys - 1 <= band.p_first || (C.right_bound && p.window_right <= 0);
      const bool after = n * kKeys >= band.p_last;
      if (before || after) return apply_linear_bias(rS, n, before ? score.slope : -score.slope);
    }
    if constexpr (C.alibi || Score<C>::kInLog2) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float first = distance(b, r, n), slope = slope_at(b, r);
          row_bias[b][r] = 0.f;
#pragma unroll
          for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              rS[b][t][2 * r + e] = score.apply(rS[b][t][2 * r + e], first + static_cast<float>(8 * t + e), slope);
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

  __device__ __forceinline__ void apply_mask(Scores& rS, int n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = band.row(position(b, r), n * kKeys + lane_col());
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (row.masks(8 * t + e)) rS[b][t][2 * r + e] = negative_infinity();
          }
      }
  }

  // Keys 8 t .. 8 t + 7 of the tile are nowhere unless bit t of `there` is set.
  static __device__ __forceinline__ void hide_absent(Scores& rS, uint32_t there) {
    static_assert(kKeyTiles <= 32, "a bit for eight keys");
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
      const bool hidden = !(there >> t & 1);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (hidden) rS[b][t][e] = negative_infinity();
    }
  }

  // Calls drop(b, t, e) for every element that dropout drops.
  template <class Drop>
  __device__ __forceinline__ void for_each_dropped(int n, Drop drop) const {
    constexpr int kTilesOfCall = kKeyTiles % 4 == 0 ? 4 : 2;  // of the four that one call covers
    const int first_tile = kTilesOfCall == 4 ? 0 : n * kKeys / 8 % 4;
    const Philox philox(p.rng);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kKeyTiles; t += kTilesOfCall) {
        const uint32_t row_group = (first_row / 16 + b) * 8 + lane_row();
        const uint32_t key_group = (n * kKeys / 32 + t / 4) * 4 + threadIdx.x % 4;
        const DropoutBytes bytes = {philox(row_group, key_group, work.batch * p.heads + work.head)};
#pragma unroll
        for (int i = 0; i < 4 * kTilesOfCall; ++i) {
          const int r = i / (2 * kTilesOfCall), tile = i / 2 % kTilesOfCall, e = i % 2;
          if (bytes.at(r, first_tile + tile, e) >= p.dropout_threshold) drop(b, t + tile, 2 * r + e);
        }
      }
  }

  __device__ __forceinline__ void apply_dropout(Scores& rS, int n) const {
    for_each_dropped(n, [&](int b, int t, int e) { rS[b][t][e] = 0.f; });
  }
};

}  // namespace fa
