// SPDX-License-Identifier: Apache-2.0
// Head packing (pack_gqa): which query of which head a row of a tile is.
#pragma once

#include "attention/config.cuh"
#include "attention/sequence.cuh"

namespace fa {

// Rows of a tile are the queries of one head or, with pack_gqa, of the whole group of heads that
// share K and V: row r is query r / group of head r % group. `head` counts FwdParams::work_heads.
// Divisions are shifts, unless the group may have any size.
template <Config C>
__device__ __forceinline__ int row_count(const FwdParams& p, const Sequence& seq) {
  if constexpr (C.any_ratio) return seq.length_q * p.heads_per_kv;
  return C.pack_gqa ? seq.length_q << p.packed_shift : seq.length_q;
}
template <Config C>
__device__ __forceinline__ int query_of(const FwdParams& p, int row) {
  if constexpr (C.any_ratio) return row / p.heads_per_kv;
  return C.pack_gqa ? row >> p.packed_shift : row;
}
template <Config C>
__device__ __forceinline__ int head_of(const FwdParams& p, int head, int row) {
  if constexpr (C.any_ratio) return head * p.heads_per_kv + row % p.heads_per_kv;
  return C.pack_gqa ? (head << p.packed_shift) + (row & ((1 << p.packed_shift) - 1)) : head;
}
// The KV head that those rows attend to.
template <Config C>
__device__ __forceinline__ int kv_head_of(const FwdParams& p, int head) {
  return C.pack_gqa ? head : head / p.heads_per_kv;
}

}  // namespace fa
