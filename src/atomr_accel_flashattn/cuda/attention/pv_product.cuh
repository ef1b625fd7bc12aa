// SPDX-License-Identifier: Apache-2.0
// Where wgmma puts P V of the pipelined main loop (kernels/fa3_fwd.cuh), and how that gets into O.
#pragma once

#include "attention/config.cuh"

namespace fa {

// Of accumulator tiles kFirst on: O = O * factor + product.
template <int kFirst, int kOfO, int kTiles>
__device__ __forceinline__ void add_product(float (&rO)[kOfO][4], const float (&factor)[2], const float (&product)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) rO[kFirst + t][e] = fmaf(rO[kFirst + t][e], factor[e / 2], product[t][e]);
}

// O is the accumulator.
template <Config C, class Rows, bool kBeside = C.pv_sum == PvSum::Beside>
struct PvProduct {
  using Output = float[C.o_width() / 8][4];
  static constexpr bool kAccumulates = true;

  static __device__ __forceinline__ Output& of(Rows& rows) { return rows.rO[0]; }
  // P V of a tile is done; `grew`: what rows.rescale says is due before that of the next.
  __device__ __forceinline__ void add_to(Rows& rows, bool grew) const {
    if (rows.softmax.anywhere(grew)) rows.rescale_output();
  }
  __device__ __forceinline__ void add_last_to(Rows&) const {}
};

// Registers of their own, from zero for each tile.
template <Config C, class Rows>
struct PvProduct<C, Rows, true> {
  using Output = float[C.o_width() / 8][4];
  static constexpr bool kAccumulates = false;

  Output product;
  float factor[2] = {0.f, 0.f};  // of O, before this product is added to it

  __device__ __forceinline__ Output& of(Rows&) { return product; }
  __device__ __forceinline__ void add_to(Rows& rows, bool) {
    add_last_to(rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = rows.rescale[0][r];
  }
  __device__ __forceinline__ void add_last_to(Rows& rows) const { add_product<0>(rows.rO[0], factor, product); }
};

}  // namespace fa
