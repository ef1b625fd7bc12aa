// SPDX-License-Identifier: Apache-2.0
// Combines the partial results of splits of the keys (flash-decoding): each is an attention over
// some keys with a maximum and a sum of its own. A learned sink joins here, once.
#pragma once

#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/params.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

// A block combines a row. Its warps share the parts: a call that is split has few rows, and what
// they read should be in flight at once. A lane takes four columns of every 128.
template <Config C>
struct SplitCombine {
  static constexpr int kLoads = (C.v_head_dim + 127) / 128, kPitch = C.v_head_dim + 4;  // floats
  // Parts that a warp reads at a time.
  static constexpr int kInFlight = 8;

  // Sums of the warps, each o and then its denominator.
  static __device__ __forceinline__ float* part_of(int warp) {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<float*>(shared) + warp * kPitch;
  }

  // A row says how many parts it has (`count`), which row of the partial sums and o each is (at),
  // floats from a row of o to the next (pitch), and where o and the LSE go.
  template <class Row>
  static __device__ __forceinline__ void run(const KvCacheParams& p, const Row& row) {
    const FwdParams& f = p.fwd;
    const int lane = threadIdx.x % 32;
    float top = negative_infinity();
    bool seen = false;  // a key or a sink, perhaps of NaN, which is no maximum
    for (int i = lane; i < row.count; i += 32) {
      const PartialSum part = p.partial_sum[row.at(i)];
      top = fmaxf(top, part.max_log2), seen |= part.sum != 0.f;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    const float sink = C.learned_sink && row.count > 0 ? f.learned_sink[row.head] * kLog2e : negative_infinity();
    top = fmaxf(top, sink);
    const bool empty = !__any_sync(0xffffffffu, seen || sink != negative_infinity());
    if (!empty) sum_parts(p, row, top);
    __syncthreads();

    float sum = C.learned_sink && !empty ? ptx::exp2(sink - top) : 0.f;
    for (int warp = 0; warp < C.warps && !empty; ++warp) sum += part_of(warp)[C.v_head_dim];
    const float scale = sum == 0.f ? 0.f : ptx::reciprocal(sum);
    if (f.lse != nullptr && threadIdx.x == 0) f.lse[row.lse_row] = sum == 0.f ? negative_infinity() : (top + ptx::log2(sum)) * kLn2;
    auto* out =
        static_cast<Bits<C.out_dtype>*>(f.o) + row.batch * f.o_stride.batch + row.query * f.o_stride.row + row.head * f.o_stride.head;
    for (int col = 2 * static_cast<int>(threadIdx.x); col < C.v_head_dim; col += 64 * C.warps) {
      float x = 0.f, y = 0.f;
      for (int warp = 0; warp < C.warps && !empty; ++warp) x += part_of(warp)[col], y += part_of(warp)[col + 1];
      store_two<C>(out, col, f.v_head_dim, x * scale, y * scale);
    }
  }

 private:
  // Every C.warps-th part, relative to the largest maximum, in log2 units. A part without keys is
  // zeros with weight 0.
  template <class Row>
  static __device__ __forceinline__ void sum_parts(const KvCacheParams& p, const Row& row, float top) {
    const int lane = threadIdx.x % 32, warp = warp_index(), cols = p.fwd.v_head_dim;
    float sum = 0.f;
    float4 o[kLoads] = {};
    for (int first = warp; first < row.count; first += kInFlight * C.warps) {
      float weight[kInFlight];
      float4 x[kInFlight][kLoads];
#pragma unroll
      for (int s = 0; s < kInFlight; ++s) {
        const int part = first + s * C.warps;
        // Loads without a branch are in flight together.
        const int64_t at = row.at(min(part, row.count - 1));
        const PartialSum own = p.partial_sum[at];
        weight[s] = part < row.count && own.sum != 0.f ? ptx::exp2(own.max_log2 - top) * own.sum : 0.f;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          x[s][i] = *reinterpret_cast<const float4*>(p.partial_o + at * row.pitch(cols) + min(128 * i + 4 * lane, cols - 4));
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

// A row of the LSE, and so of each split.
struct SplitRow {
  uint32_t lse_row, batch, head;
  int64_t query, step;
  int count;
  __device__ __forceinline__ int64_t at(int split) const { return split * step + lse_row; }
  __device__ __forceinline__ int pitch(int cols) const { return cols; }
};

// A block has a row of the LSE: its sequence, head and query.
template <Config C>
__device__ __forceinline__ void split_combine(const KvCacheParams& p) {
  const FwdParams& f = p.fwd;
  // A grid has fewer than 2^31 blocks: 32 bits count rows.
  const uint32_t row = blockIdx.x, rows_of_batch = static_cast<uint32_t>(C.varlen ? p.lse_rows : f.lse_batch_stride);
  const uint32_t batch = row / rows_of_batch, rest = row - batch * rows_of_batch;
  const uint32_t head = rest / static_cast<uint32_t>(f.lse_head_stride);
  // Packed: a row of q.
  const int64_t query = rest - head * static_cast<uint32_t>(f.lse_head_stride);
  // No split has written a row without an owner.
  const int splits = !C.varlen || query < f.cu_seqlens_q[f.batch] ? p.splits : 0;
  SplitCombine<C>::run(p, SplitRow{row, C.varlen ? 0 : batch, head, query, p.lse_rows, splits});
}

}  // namespace fa
