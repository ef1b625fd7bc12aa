// SPDX-License-Identifier: Apache-2.0
// Factors of fp8 q, k and v by blocks of 128 tokens, which are counted inside each sequence.
#pragma once

#include "attention/config.cuh"
#include "attention/head_packing.cuh"
#include "attention/params.cuh"

namespace fa {

__device__ __forceinline__ float read_descale(const float* x, const Strides& step, int batch, int head_kv, int block) {
  return x == nullptr ? 1.f : x[batch * step.batch + head_kv * step.head + block * step.row];
}

template <Config C, class Params, bool kOn = C.block_descales>
struct BlockDescales {
  template <class Rows>
  __device__ __forceinline__ BlockDescales(const Params&, const Rows&) {}
};

// A tile of keys lies in one block. Scores are multiplied by the factors of their row and tile, and
// O has the unit of the last tile: it is rescaled where the factor of v changes.
template <Config C, class Params>
struct BlockDescales<C, Params, true> {
  static_assert(kScaledTokens % C.block_n == 0 && C.pv_sum != PvSum::InO);
  static constexpr int kTiles = C.block_n / 8;

  const Params& p;
  const int batch, head_kv;
  float q[2];  // of this lane's rows
  float k = 1.f, v = 1.f;
  float unit = 0.f;  // of O; 0: nothing has been added to it

  template <class Rows>
  __device__ __forceinline__ BlockDescales(const Params& params, const Rows& rows)
      : p(params), batch(rows.work.batch), head_kv(kv_head_of<C>(params.fwd, rows.work.head)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = max(0, min(query_of<C>(p.fwd, rows.row_at(0, r)), rows.seq.length_q - 1));
      q[r] = read_descale(p.q_descale, p.q_descale_stride, batch, head_kv, query / kScaledTokens);
    }
  }

  // Those of tile n; its latency hides behind the product Q K^T.
  __device__ __forceinline__ void load(int n) {
    const int block = n * C.block_n / kScaledTokens;
    k = read_descale(p.k_descale, p.k_descale_stride, batch, head_kv, block);
    v = read_descale(p.v_descale, p.v_descale_stride, batch, head_kv, block);
  }

  __device__ __forceinline__ void apply(float (&rS)[kTiles][4]) const {
    const float factor[2] = {q[0] * k, q[1] * k};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) rS[t][e] *= factor[e / 2];
  }

  // Before P of the tile is packed: brings O to the factor of v, through `rescale`. A factor of 0
  // leaves the unit and hides P.
  __device__ __forceinline__ void change_unit(float (&rP)[kTiles][4], float (&rescale)[2]) {
    if (v == 0.f) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rP[t][e] = 0.f;
    }
    if (v == 0.f || v == unit) return;
    const float ratio = unit / v;
    unit = v;
#pragma unroll
    for (int r = 0; r < 2; ++r) rescale[r] *= ratio;
  }
};

}  // namespace fa
