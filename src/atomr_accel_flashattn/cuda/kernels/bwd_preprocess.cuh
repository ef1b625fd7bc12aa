// SPDX-License-Identifier: Apache-2.0
// Before the backward: delta = rowsum(dO * O) - dLSE (FlashAttention-2, Algorithm 2, line 4), and
// zeros in the accumulator of dQ.
#pragma once

#include "attention/dq_sum.cuh"
#include "attention/dq_turns.cuh"
#include "attention/mask.cuh"
#include "attention/row_statistics.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

// Eight lanes take a row, eight columns each at a time.
template <Config C>
struct BackwardPreprocess {
  static constexpr int kThreads = C.warps * 32, kLanes = 8, kRowsPerPass = kThreads / kLanes;
  const BwdParams& p;
  const Sequence seq;
  const int batch, head;

  __device__ __forceinline__ void run(int first_row) const {
    clear(first_row);
#pragma unroll
    for (int pass = 0; pass < C.block_m / kRowsPerPass; ++pass) {
      const int row = first_row + pass * kRowsPerPass + static_cast<int>(threadIdx.x) / kLanes;
      write_delta(row, row < seq.length_q);
    }
  }

 private:
  __device__ __forceinline__ int64_t row_of_lse() const {
    return batch * p.fwd.lse_batch_stride + head * p.fwd.lse_head_stride + seq.q_row;
  }

  // Tiles of the accumulator are neighbours.
  __device__ __forceinline__ void clear(int first_row) const {
    const DqSum<C.varlen> sum{p};
    auto* target = reinterpret_cast<float4*>(sum.tile(seq, batch, head, first_row));
    const int tile_rows = (min(C.block_m, seq.length_q - first_row) + sum.kRows - 1) / sum.kRows;
    const int count = tile_rows * sum.tiles_across() * (sum.kTile / 4);
    for (int i = threadIdx.x; i < count; i += kThreads) target[i] = {0.f, 0.f, 0.f, 0.f};
  }

  // All lanes of a warp come here, for the sum over those of a row.
  __device__ __forceinline__ void write_delta(int row, bool owned) const {
    const FwdParams& f = p.fwd;
    const int lane = threadIdx.x % kLanes;
    const int64_t at = row_of_lse() + row;
    // What a row without keys holds does not count: it may be NaN. Only its dLSE does, with a
    // learned sink.
    const RowRange keys = Band<C>(f, seq, row, 1).keys();
    const bool idle = !owned || !(keys.begin < keys.end || keys.sinks > 0) || f.lse[at] == negative_infinity();
    float sum = 0.f;
    if (!idle && p.dout != nullptr) {
      const uint16_t* dout = row_of(p.dout, p.dout_stride, row);
      const uint16_t* out = row_of(f.o, f.o_stride, row);
#pragma unroll 4
      for (int col = 8 * lane; col < f.v_head_dim; col += 8 * kLanes) sum += product_of_8(dout + col, out + col);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0 && owned) {
      const bool counts = p.dlse != nullptr && (C.learned_sink || !idle);
      p.statistics[RowStatistics::index(at)] = {idle ? -negative_infinity() : f.lse[at] * kLog2e, counts ? sum - p.dlse[at] : sum};
    }
  }

  static __device__ __forceinline__ float product_of_8(const uint16_t* x, const uint16_t* y) {
    using Traits = MmaTraits<C.dtype>;
    const uint4 a = load_8(x), b = load_8(y);
    const uint32_t u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(Traits::widen(u[i] & 0xffffu), Traits::widen(v[i] & 0xffffu), sum);
      sum = fmaf(Traits::widen(u[i] >> 16), Traits::widen(v[i] >> 16), sum);
    }
    return sum;
  }
  static __device__ __forceinline__ uint4 load_8(const uint16_t* x) {
    if constexpr (C.aligned) return *reinterpret_cast<const uint4*>(x);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ __forceinline__ const uint16_t* row_of(const void* x, const Strides& stride, int row) const {
    return static_cast<const uint16_t*>(x) + seq.batch * stride.batch + (seq.q_row + row) * stride.row + head * stride.head;
  }
};

template <Config C>
__device__ __forceinline__ void backward_preprocess(const BwdParams& p) {
  const int blocks_m = (p.fwd.seqlen_q + C.block_m - 1) / C.block_m;
  const int pair = blockIdx.x / blocks_m, block_m = blockIdx.x - pair * blocks_m;
  const int batch = pair / p.fwd.heads, head = pair - batch * p.fwd.heads;
  if (blockIdx.x == 0 && threadIdx.x == 0) p.statistics[RowStatistics::kNone] = {-negative_infinity(), 0.f};
  if constexpr (C.deterministic) DqTurns<C>{p}.clear();
  const Sequence seq = read_sequence<C.varlen>(p.fwd, batch);
  if (block_m * C.block_m < seq.length_q) BackwardPreprocess<C>{p, seq, batch, head}.run(block_m * C.block_m);
}

}  // namespace fa
