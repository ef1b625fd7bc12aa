// SPDX-License-Identifier: Apache-2.0
// Descales of fp8 K and V in the kernel over a cache. Those of q and k multiply scores. Those of v
// belong to keys, which a sum has lost: O is kept in units of the last one, and where another one
// comes it is brought to that, as for a new maximum.
#pragma once

#include "attention/head_packing.cuh"
#include "attention/kv_cache.cuh"
#include "attention/params.cuh"
#include "attention/scheduler.cuh"

namespace fa {

// Of K and V in 16 bits: nothing.
template <Config C>
struct NoDescales {
  struct OfTile {};
  __device__ __forceinline__ void begin(const FwdParams&, const WorkTile&, const Sequence&, int) {}
  __device__ __forceinline__ OfTile load(int, const CachedKey&, bool) const { return {}; }
  template <class Scores>
  __device__ __forceinline__ void multiply_scores(Scores&, const OfTile&) const {}
  template <class Scores, class Output>
  __device__ __forceinline__ void multiply_probabilities(Scores&, Output&, const OfTile&) {}
  __device__ __forceinline__ float of_output(float x) const { return x; }
};

template <Config C, class Params>
struct KeyDescales {
  static_assert(kScaledTokens % C.block_n == 0, "a tile has one descale");
  static_assert(C.paged || !(C.k_token_scales || C.v_token_scales), "tokens have descales beside a paged cache");
  static_assert(!C.batch_invariant || !C.v_token_scales, "the unit of O would depend on the keys that other rows see");
  // O is not brought to a unit that is smaller than the last one by more than this.
  static constexpr float kLargestRatio = 1.8446744e19f;

  // Of a tile, or of this lane's key.
  struct OfTile {
    float k, v;
  };

  const Params& p;
  const float *k = nullptr, *v = nullptr;  // of this sequence, or of block 0, and of this KV head
  float q[2] = {1.f, 1.f};                 // of this lane's rows
  float unit = 0.f;                        // of O

  __device__ __forceinline__ explicit KeyDescales(const Params& params) : p(params) {}

  // `row`: the first one of the warp.
  __device__ __forceinline__ void begin(const FwdParams& f, const WorkTile& work, const Sequence& seq, int row) {
    if (p.q_descale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = row + 8 * r + static_cast<int>(threadIdx.x) % 32 / 4;
        if (at < row_count<C>(f, seq))
          q[r] = p.q_descale[work.batch * p.q_descale_stride.batch + work.head * p.q_descale_stride.head +
                             query_of<C>(f, at) / kScaledTokens * p.q_descale_stride.row];
      }
    }
    k = base<C.k_token_scales>(p.k_descale, p.k_descale_stride, work);
    v = base<C.v_token_scales>(p.v_descale, p.v_descale_stride, work);
  }

  // Also with what row r of Q was divided by.
  __device__ __forceinline__ void multiply_row(int r, float factor) { q[r] *= factor; }

  // Of tile n; `key` is this lane's.
  __device__ __forceinline__ OfTile load(int n, const CachedKey& key, bool exists) const {
    return {read<C.k_token_scales>(k, p.k_descale_stride, n, key, exists), read<C.v_token_scales>(v, p.v_descale_stride, n, key, exists)};
  }

  template <class Scores>
  __device__ __forceinline__ void multiply_scores(Scores& rS, const OfTile& tile) const {
    if constexpr (C.k_token_scales) {
      for_each_key(rS, tile.k, [this](float& x, float of_key, int r) { x *= q[r] * of_key; });
    } else {
      const float of_row[2] = {q[0] * tile.k, q[1] * tile.k};
      for_each_key(rS, [&](float& x, int r) { x *= of_row[r]; });
    }
  }

  // Brings O to the unit of the tile, or its probabilities to that of O.
  template <class Scores, class Output>
  __device__ __forceinline__ void multiply_probabilities(Scores& rS, Output& rO, const OfTile& tile) {
    const float wanted = unit_of(tile.v);
    if (C.v_token_scales ? wanted > unit || wanted < 0.25f * unit : wanted != unit) {
      const float ratio = unit / wanted;
      if (fabsf(ratio) <= kLargestRatio) {
#pragma unroll
        for (auto& of_tile : rO[0])
#pragma unroll
          for (float& x : of_tile) x *= ratio;
        unit = wanted;
      }
    }
    if constexpr (C.v_token_scales) {
      const float to_unit = unit == 0.f ? 0.f : 1.f / unit;
      for_each_key(rS, tile.v, [to_unit](float& x, float of_key, int) { x *= of_key * to_unit; });
    } else if (C.batch_invariant ? tile.v != unit : wanted != unit) {
      const float to_unit = tile.v / unit;
      for_each_key(rS, [to_unit](float& x, int) { x *= to_unit; });
    }
  }

  __device__ __forceinline__ float of_output(float x) const { return x * unit; }

 private:
  template <bool kOfToken>
  static __device__ __forceinline__ const float* base(const float* x, const Strides& step, const WorkTile& work) {
    return x == nullptr ? nullptr : x + work.head * step.head + (kOfToken ? 0 : work.batch * step.batch);
  }
  template <bool kOfToken>
  static __device__ __forceinline__ float read(const float* x, const Strides& step, int n, const CachedKey& key, bool exists) {
    if (x == nullptr) return 1.f;
    if constexpr (kOfToken) return exists ? x[key.block * step.batch + key.row * step.row] : 0.f;
    return x[n * C.block_n / kScaledTokens * step.row];
  }

  // Of tokens the largest one. Batch-invariant: a power of two, with which no rounding changes for
  // the rows that see nothing of the tile.
  static __device__ __forceinline__ float unit_of(float x) {
    if constexpr (C.v_token_scales) {
      x = fabsf(x);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    if constexpr (C.batch_invariant) return __int_as_float((__float_as_int(x) + 0x7fffff) & 0x7f800000);
    return x;
  }

  template <class Scores, class Apply>
  static __device__ __forceinline__ void for_each_key(Scores& rS, Apply apply) {
#pragma unroll
    for (int t = 0; t < C.block_n / 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) apply(rS[0][t][e], e / 2);
  }
  // With the number that a lane has for each of its keys.
  template <class Scores, class Apply>
  static __device__ __forceinline__ void for_each_key(Scores& rS, float of_lane, Apply apply) {
#pragma unroll
    for (int t = 0; t < C.block_n / 8; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of_key = __shfl_sync(0xffffffffu, of_lane, 8 * t + static_cast<int>(threadIdx.x) % 4 * 2 + i);
        apply(rS[0][t][i], of_key, 0);
        apply(rS[0][t][2 + i], of_key, 1);
      }
  }
};

}  // namespace fa
