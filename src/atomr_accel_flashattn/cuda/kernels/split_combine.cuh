// SPDX-License-Identifier: Apache-2.0
// Combines the partial results of splits of the keys (flash-decoding): each is an attention over
// some keys with an LSE of its own. A learned sink joins here, once.
#pragma once

#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/params.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

// A block combines a row of the LSE: its sequence, head and query. Its warps share the splits: a
// call that is split has few rows, and what they read should be in flight at once. A lane takes
// four columns of every 128.
template <Config C>
struct SplitCombine {
  static constexpr int kLoads = (C.v_head_dim + 127) / 128, kPitch = C.v_head_dim + 4;  // floats
  static constexpr int kInFlight = 8;                                                   // splits of a warp

  // Sums of the warps, each o and then its denominator.
  static __device__ __forceinline__ float* part_of(int warp) {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<float*>(shared) + warp * kPitch;
  }

  static __device__ __forceinline__ void run(const KvCacheParams& p) {
    const FwdParams& f = p.fwd;
    const int lane = threadIdx.x % 32;
    // A grid has fewer than 2^31 blocks: 32 bits count rows.
    const uint32_t row = blockIdx.x, rows_of_batch = static_cast<uint32_t>(C.varlen ? p.lse_rows : f.lse_batch_stride);
    const uint32_t batch = row / rows_of_batch, rest = row - batch * rows_of_batch;
    const uint32_t head = rest / static_cast<uint32_t>(f.lse_head_stride);
    const int64_t query = rest - head * static_cast<uint32_t>(f.lse_head_stride);  // packed: of q
    // No split has written a row without an owner.
    const int splits = !C.varlen || query < f.cu_seqlens_q[f.batch] ? p.splits : 0;

    float top = negative_infinity();
    for (int split = lane; split < splits; split += 32) top = fmaxf(top, p.partial_lse[split * p.lse_rows + row]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    const float sink = C.learned_sink && splits > 0 ? f.learned_sink[head] : negative_infinity();
    top = fmaxf(top, sink);
    const bool empty = top == negative_infinity();
    if (!empty) sum_splits(p, row, splits, top);
    __syncthreads();

    float sum = C.learned_sink && !empty ? ptx::exp2((sink - top) * kLog2e) : 0.f;
    for (int warp = 0; warp < C.warps && !empty; ++warp) sum += part_of(warp)[C.v_head_dim];
    const float scale = sum == 0.f ? 0.f : ptx::reciprocal(sum);
    if (f.lse != nullptr && threadIdx.x == 0) f.lse[row] = sum == 0.f ? negative_infinity() : top + ptx::log2(sum) * kLn2;
    auto* out = static_cast<uint16_t*>(f.o) + (C.varlen ? 0 : batch * f.o_stride.batch) + query * f.o_stride.row + head * f.o_stride.head;
    for (int col = 2 * static_cast<int>(threadIdx.x); col < C.v_head_dim; col += 64 * C.warps) {
      float x = 0.f, y = 0.f;
      for (int warp = 0; warp < C.warps && !empty; ++warp) x += part_of(warp)[col], y += part_of(warp)[col + 1];
      store_pair<C>(out, col, f.v_head_dim, MmaTraits<C.dtype>::pack(x * scale, y * scale));
    }
  }

 private:
  // Every C.warps-th split, relative to the largest LSE. A split without keys is zeros with weight
  // 0.
  static __device__ __forceinline__ void sum_splits(const KvCacheParams& p, uint32_t row, int splits, float top) {
    const int lane = threadIdx.x % 32, warp = warp_index(), cols = p.fwd.v_head_dim;
    float sum = 0.f;
    float4 o[kLoads] = {};
    for (int first = warp; first < splits; first += kInFlight * C.warps) {
      float weight[kInFlight];
      float4 x[kInFlight][kLoads];
#pragma unroll
      for (int s = 0; s < kInFlight; ++s) {
        const int split = first + s * C.warps;
        // Loads without a branch are in flight together.
        const int64_t at = min(split, splits - 1) * p.lse_rows + row;
        const float lse = p.partial_lse[at];
        weight[s] = split < splits ? ptx::exp2((lse - top) * kLog2e) : 0.f;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          x[s][i] = *reinterpret_cast<const float4*>(p.partial_o + at * cols + min(128 * i + 4 * lane, cols - 4));
      }
#pragma unroll
      for (int s = 0; s < kInFlight; ++s) {
        if (weight[s] == 0.f) continue;
        sum += weight[s];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          o[i] = {fmaf(weight[s], x[s][i].x, o[i].x), fmaf(weight[s], x[s][i].y, o[i].y), fmaf(weight[s], x[s][i].z, o[i].z),
                  fmaf(weight[s], x[s][i].w, o[i].w)};
      }
    }
    float* part = part_of(warp);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (const int col = 128 * i + 4 * lane; col < C.v_head_dim) *reinterpret_cast<float4*>(part + col) = o[i];
    if (lane == 0) part[C.v_head_dim] = sum;
  }
};

template <Config C>
__device__ __forceinline__ void split_combine(const KvCacheParams& p) {
  SplitCombine<C>::run(p);
}

}  // namespace fa
