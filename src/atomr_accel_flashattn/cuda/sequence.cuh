// Lengths and first rows of one sequence: dense tensors, or sequences packed one after the other (varlen).
#pragma once

#include "config.cuh"
#include "params.cuh"

namespace fa {

struct Sequence {
  int length_q, length_k;
  int64_t q_row, k_row;  // first row in the packed tensor; 0 when dense
  int batch;             // factor of the batch stride; 0 when packed
};

template <bool kVarlen, class Params>
__device__ __forceinline__ Sequence read_sequence(const Params& p, int batch) {
  if constexpr (kVarlen) {
    const int q = p.cu_seqlens_q[batch], k = p.cu_seqlens_k[batch];
    return {p.cu_seqlens_q[batch + 1] - q, p.cu_seqlens_k[batch + 1] - k, q, k, 0};
  } else {
    return {p.seqlen_q, p.seqlen_k, 0, 0, batch};
  }
}

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
