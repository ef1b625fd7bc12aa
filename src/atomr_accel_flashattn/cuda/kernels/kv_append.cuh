// SPDX-License-Identifier: Apache-2.0
// New tokens into a cache of K and V, with rotary embedding (RoFormer, arXiv 2104.09864) of K and Q
// on the way. What does not fit is not written.
#pragma once

#include "attention/params.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

template <DType kDType, bool kPaged, bool kInterleaved, bool kWideRotary>
struct KvAppend {
  static constexpr int kChunk = 8;  // columns of a thread
  using Traits = MmaTraits<kDType>;
  const KvAppendParams& p;
  __device__ __forceinline__ explicit KvAppend(const KvAppendParams& params) : p(params) {}

  // Work is a number for each chunk of each row of new K, then of new V, then of Q.
  __device__ __forceinline__ void run(int64_t work) const {
    const int k_chunks = chunks(p.head_dim), v_chunks = chunks(p.v_head_dim);
    const int64_t tokens = int64_t{p.batch} * p.seqlen_new, of_k = tokens * p.heads_kv * k_chunks, of_v = tokens * p.heads_kv * v_chunks;
    if (work < of_k) {
      append(work, k_chunks, p.new_k, p.new_k_stride, p.k, p.k_stride, p.head_dim, p.cos != nullptr);
    } else if (work < of_k + of_v) {
      append(work - of_k, v_chunks, p.new_v, p.new_v_stride, p.v, p.v_stride, p.v_head_dim, false);
    } else if (p.q != nullptr && p.seqlen_q > 0) {  // the last block has threads without work
      rotate_q(work - of_k - of_v, k_chunks);
    }
  }

 protected:
  static __device__ __forceinline__ int chunks(int cols) { return (cols + kChunk - 1) / kChunk; }

  __device__ __forceinline__ void append(int64_t work, int row_chunks, const void* source, const Strides& stride, void* cache,
                                         const Strides& cache_stride, int cols, bool rotates) const {
    const int64_t row = work / row_chunks, token = row / p.heads_kv;
    const int chunk = static_cast<int>(work - row * row_chunks), head = static_cast<int>(row - token * p.heads_kv);
    const int batch = static_cast<int>(token / p.seqlen_new), index = static_cast<int>(token - int64_t{batch} * p.seqlen_new);
    int64_t first = 0, count = p.seqlen_new;
    if (p.cu_seqlens_new != nullptr) first = p.cu_seqlens_new[batch], count = p.cu_seqlens_new[batch + 1] - first;
    if (index >= count) return;
    const int64_t slot = length(batch) + index;
    int64_t at;
    const bool known = p.cos == nullptr || slot < p.rotary_rows;  // V goes where its K goes
    if (slot < 0 || slot >= p.capacity || !known || !locate(batch, slot, cache_stride, at)) {
      if (p.error != nullptr) atomicMax(p.error, batch + 1);
      return;
    }
    const int64_t from = p.cu_seqlens_new == nullptr ? batch * stride.batch + index * stride.row : (first + index) * stride.row;
    copy(static_cast<const uint16_t*>(source) + from + head * stride.head, static_cast<uint16_t*>(cache) + at + head * cache_stride.head,
         chunk * kChunk, cols, rotates ? slot : -1);
  }

  // Slots of a sequence in use before.
  __device__ __forceinline__ int64_t length(int batch) const {
    return p.cache_lengths != nullptr ? p.cache_lengths[batch] : p.cu_seqlens_k[batch + 1] - p.cu_seqlens_k[batch];
  }
  // Elements from the beginning of the cache to a slot; whether it exists.
  __device__ __forceinline__ bool locate(int batch, int64_t slot, const Strides& stride, int64_t& at) const {
    if constexpr (kPaged) {
      const int64_t page = slot / p.block_size;
      const int block = p.blocks[batch * p.table_stride + page];
      at = block * stride.batch + (slot - page * p.block_size) * stride.row;
      return block >= 0 && block < p.num_blocks;
    } else {
      const int64_t block = p.blocks == nullptr ? batch : p.blocks[batch];
      at = block * stride.batch + slot * stride.row;
      return block >= 0 && block < p.num_blocks;
    }
  }

  __device__ __forceinline__ void rotate_q(int64_t work, int row_chunks) const {
    if (p.rotated_q == nullptr) return;
    const int64_t row = work / row_chunks, token = row / p.heads;
    const int chunk = static_cast<int>(work - row * row_chunks), head = static_cast<int>(row - token * p.heads);
    const int batch = static_cast<int>(token / p.seqlen_q), index = static_cast<int>(token - int64_t{batch} * p.seqlen_q);
    if (batch >= p.batch) return;
    int64_t first = 0, count = p.seqlen_q;
    if (p.cu_seqlens_q != nullptr) first = p.cu_seqlens_q[batch], count = p.cu_seqlens_q[batch + 1] - first;
    if (index >= count) return;
    const int64_t slot = length(batch) + (p.q_advances ? index : 0);
    const bool known = slot >= 0 && slot < p.rotary_rows;
    if (!known && p.error != nullptr) atomicMax(p.error, batch + 1);
    const auto at = [&](const Strides& stride) {
      return (p.cu_seqlens_q == nullptr ? batch * stride.batch : 0) + (first + index) * stride.row + head * stride.head;
    };
    copy(static_cast<const uint16_t*>(p.q) + at(p.q_stride), static_cast<uint16_t*>(p.rotated_q) + at(p.rotated_q_stride), chunk * kChunk,
         p.head_dim, known ? slot : -1);
  }

  // Columns from `col` on, rotated by a row of cos and sin unless it is negative. Products of two
  // 16-bit numbers are exact in float32, so the result does not depend on how they are added.
  __device__ __forceinline__ void copy(const uint16_t* from, uint16_t* to, int col, int cols, int64_t rotation) const {
    const int half = p.rotary_dim / 2;
    for (int i = col; i < min(col + kChunk, cols); ++i) {
      if (rotation < 0 || i >= p.rotary_dim) {
        to[i] = from[i];
        continue;
      }
      to[i] = rotated(from, i, half, rotation);
    }
  }
  // Column i < rotary_dim, rotated.
  __device__ __forceinline__ uint16_t rotated(const uint16_t* from, int i, int half, int64_t rotation) const {
    const int pair = kInterleaved ? i / 2 : i % half;
    const bool second = kInterleaved ? i % 2 == 1 : i >= half;
    const int other = kInterleaved ? i ^ 1 : second ? i - half : i + half;
    const float cos = widen(p.cos, rotation * half + pair), sin = widen(p.sin, rotation * half + pair);
    const float x = Traits::widen(from[i]), y = Traits::widen(from[other]);
    return static_cast<uint16_t>(Traits::pack(second ? fmaf(x, cos, y * sin) : fmaf(x, cos, -(y * sin)), 0.f));
  }
  // Of cos and sin, which are of the type of K or float32.
  static __device__ __forceinline__ float widen(const void* x, int64_t at) {
    return kWideRotary ? static_cast<const float*>(x)[at] : Traits::widen(static_cast<const uint16_t*>(x)[at]);
  }
};

template <DType kDType, int kThreads, bool kPaged, bool kInterleaved, bool kWideRotary>
__device__ __forceinline__ void kv_append(const KvAppendParams& p) {
  KvAppend<kDType, kPaged, kInterleaved, kWideRotary>(p).run(int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

}  // namespace fa
