// SPDX-License-Identifier: Apache-2.0
// New tokens into a cache of fp8 K and V (kv_append.cuh): quantised, if they have 16 bits. Descales
// of tokens are made here, all others are read.
#pragma once

#include "kernels/kv_append.cuh"
#include "ptx/fp8.cuh"

namespace fa {

// kSource: of new K and V; fp8: they have the types of the cache, and are copied. A warp has a row.
template <DType kSource, DType kK, DType kV, bool kPaged, bool kInterleaved, bool kWideRotary, bool kTokensK, bool kTokensV>
struct Fp8Append : KvAppend<bytes_of(kSource) == 1 ? DType::F16 : kSource, kPaged, kInterleaved, kWideRotary> {
  static constexpr bool kQuantises = bytes_of(kSource) == 2;
  static constexpr int kHeld = 8;  // columns of a lane, of 256
  using Base = KvAppend<kQuantises ? kSource : DType::F16, kPaged, kInterleaved, kWideRotary>;
  using Base::p, Base::length, Base::locate, Base::chunks, Base::rotate_q, Base::rotated;
  const Fp8AppendParams& own;

  __device__ __forceinline__ explicit Fp8Append(const Fp8AppendParams& params) : Base(params.append), own(params) {}

  // Work is a number for each row of new K, then of new V, then of Q.
  __device__ __forceinline__ void run(int64_t work) const {
    const int64_t rows = int64_t{p.batch} * p.seqlen_new * p.heads_kv;
    if (work < rows) {
      append<kK, kTokensK>(work, p.new_k, p.new_k_stride, p.k, p.k_stride, p.head_dim, p.cos != nullptr, own.k_descale,
                           own.k_descale_stride);
    } else if (work < 2 * rows) {
      append<kV, kTokensV>(work - rows, p.new_v, p.new_v_stride, p.v, p.v_stride, p.v_head_dim, false, own.v_descale, own.v_descale_stride);
    } else if (p.q != nullptr && p.seqlen_q > 0) {
      const int lane = threadIdx.x % 32, of_row = chunks(p.head_dim);
      for (int chunk = lane; chunk < of_row; chunk += 32) rotate_q((work - 2 * rows) * of_row + chunk, of_row);
    }
  }

 private:
  template <DType kType, bool kOfTokens>
  __device__ __forceinline__ void append(int64_t row, const void* source, const Strides& stride, void* cache, const Strides& cache_stride,
                                         int cols, bool rotates, float* descale, const Strides& step) const {
    const int64_t token = row / p.heads_kv;
    const int head = static_cast<int>(row - token * p.heads_kv), lane = threadIdx.x % 32;
    const int batch = static_cast<int>(token / p.seqlen_new), index = static_cast<int>(token - int64_t{batch} * p.seqlen_new);
    int64_t first = 0, count = p.seqlen_new;
    if (p.cu_seqlens_new != nullptr) first = p.cu_seqlens_new[batch], count = p.cu_seqlens_new[batch + 1] - first;
    if (index >= count) return;
    const int64_t slot = length(batch) + index;
    int64_t at;
    const bool known = p.cos == nullptr || slot < p.rotary_rows;  // V goes where its K goes
    if (slot < 0 || slot >= p.capacity || !known || !locate(batch, slot, cache_stride, at)) {
      if (p.error != nullptr && lane == 0) atomicMax(p.error, batch + 1);
      return;
    }
    const int64_t from =
        (p.cu_seqlens_new == nullptr ? batch * stride.batch + index * stride.row : (first + index) * stride.row) + head * stride.head;
    auto* to = static_cast<uint8_t*>(cache) + at + head * cache_stride.head;
    if constexpr (kQuantises) {
      float x[kHeld];
      read(x, static_cast<const uint16_t*>(source) + from, cols, rotates ? slot : -1);
      quantise<kType>(to, x, cols, scale_of<kType, kOfTokens>(x, descale, step, batch, head, slot));
    } else {
      for (int i = lane; i < cols; i += 32) to[i] = static_cast<const uint8_t*>(source)[from + i];
    }
  }

  // Columns of this lane, rotated by a row of cos and sin unless it is negative, in their own type.
  __device__ __forceinline__ void read(float (&x)[kHeld], const uint16_t* from, int cols, int64_t rotation) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int col = threadIdx.x % 32 + 32 * i;
      x[i] = 0.f;
      if (col < cols)
        x[i] = Base::Traits::widen(rotation < 0 || col >= p.rotary_dim ? from[col] : rotated(from, col, p.rotary_dim / 2, rotation));
    }
  }

  // Of a token it is made, and written beside it.
  template <DType kType, bool kOfTokens>
  __device__ __forceinline__ float scale_of(const float (&x)[kHeld], float* descale, const Strides& step, int batch, int head,
                                            int64_t slot) const {
    if (descale == nullptr) return 1.f;
    descale += head * step.head;
    if constexpr (kOfTokens) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      // Never below the smallest normal number: a scale of few bits would cut off the largest one.
      const float scale = largest > 0.f ? fmaxf(largest / (kType == DType::F8E4M3 ? 448.f : 57344.f), 1.17549435e-38f) : 1.f;
      int64_t at;
      if (threadIdx.x % 32 == 0 && locate(batch, slot, step, at)) descale[at] = scale;
      return scale;
    } else {
      const int64_t key = slot - (own.left_pad == nullptr ? 0 : max(0, own.left_pad[batch]));
      return descale[batch * step.batch + max(int64_t{0}, key) / kScaledTokens * step.row];
    }
  }

  template <DType kType>
  static __device__ __forceinline__ void quantise(uint8_t* to, const float (&x)[kHeld], int cols, float scale) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int col = threadIdx.x % 32 + 32 * i;
      const float value = x[i] / scale;
      const uint32_t bits = kType == DType::F8E4M3 ? ptx::pack_e4m3(value, 0.f) : ptx::pack_e5m2(value, 0.f);
      if (col < cols) to[col] = static_cast<uint8_t>(bits);
    }
  }
};

template <DType kSource, DType kK, DType kV, int kThreads, bool kPaged, bool kInterleaved, bool kWideRotary, bool kTokensK, bool kTokensV>
__device__ __forceinline__ void fp8_append(const Fp8AppendParams& p) {
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  Fp8Append<kSource, kK, kV, kPaged, kInterleaved, kWideRotary, kTokensK, kTokensV>(p).run(warp);
}

}  // namespace fa
