// Which query of which head a row of a tile is.
#pragma once

#include "attention/config.cuh"
#include "attention/sequence.cuh"

namespace fa {

// Rows of a tile are the queries of one head or, with `pack_gqa`, those of all heads that share K and V: row r is query r / group of head r % group
// among them. `head` is one that tiles are made for (FwdParams::work_heads).
template <Config C>
__device__ __forceinline__ int row_count(const FwdParams& p, const Sequence& seq) {
  return C.pack_gqa ? seq.length_q << p.packed_shift : seq.length_q;
}
template <Config C>
__device__ __forceinline__ int query_of(const FwdParams& p, int row) {
  return C.pack_gqa ? row >> p.packed_shift : row;
}
template <Config C>
__device__ __forceinline__ int head_of(const FwdParams& p, int head, int row) {
  return C.pack_gqa ? (head << p.packed_shift) + (row & ((1 << p.packed_shift) - 1)) : head;
}
// The head of k and v that those rows see.
template <Config C>
__device__ __forceinline__ int kv_head_of(const FwdParams& p, int head) {
  return C.pack_gqa ? head : head / p.heads_per_kv;
}

}  // namespace fa
