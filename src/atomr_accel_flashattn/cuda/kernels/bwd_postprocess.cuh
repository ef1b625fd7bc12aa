// SPDX-License-Identifier: Apache-2.0
// After the backward: dQ from its float32 accumulator, the gradient of a learned sink, and zeros in
// the rows that no sequence owns. Blocks do one of the three.
#pragma once

#include "attention/dq_sum.cuh"
#include "attention/epilogue.cuh"
#include "attention/row_statistics.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

template <Config C>
struct BackwardPostprocess {
  static constexpr int kThreads = C.warps * 32;
  const BwdParams& p;

  // block_m rows of one head and sequence. A warp takes 16 rows x 32 columns at a time, scaled.
  __device__ __forceinline__ void convert_dq(int block) const {
    const FwdParams& f = p.fwd;
    const int blocks_m = (f.seqlen_q + C.block_m - 1) / C.block_m;
    const int pair = block / blocks_m, first_row = (block - pair * blocks_m) * C.block_m;
    const int batch = pair / f.heads, head = pair - batch * f.heads;
    const Sequence seq = read_sequence<C.varlen>(f, batch);
    const int groups = (f.head_dim + 31) / 32, lane_row = threadIdx.x % 32 / 4;
    auto* out = static_cast<uint16_t*>(p.dq) + seq.batch * p.dq_stride.batch + seq.q_row * p.dq_stride.row + head * p.dq_stride.head;
    for (int i = warp_index(); i < C.block_m / 16 * groups; i += C.warps) {
      const int tile_row = i / groups, group = i - tile_row * groups, row = first_row + 16 * tile_row;
      if (row >= seq.length_q) break;
      const DqSum<C.varlen> sum{p};
      const float* tile = sum.tile(seq, batch, head, row) + 4 * group * sum.kTile;
      float x[4][4] = {};
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (32 * group + 8 * t < f.head_dim) ptx::load_global_fragment(x[t], tile + t * sum.kTile);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t words[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) words[t] = MmaTraits<C.dtype>::pack(x[t][2 * r] * p.softmax_scale, x[t][2 * r + 1] * p.softmax_scale);
        transpose_quad(words);
        const int at = row + 8 * r + lane_row;
        if (at < seq.length_q) store_quad<C>(out + at * p.dq_stride.row, 32 * group, f.head_dim, words);
      }
    }
  }

  // dsink = sum of exp(sink - LSE) (dLSE - delta) over the rows of a head, in one order.
  __device__ __forceinline__ void reduce_dsink(int head, float* partial) const {
    const FwdParams& f = p.fwd;
    const float sink = f.learned_sink[head];
    const int batches = C.varlen ? 1 : f.batch, rows = C.varlen ? f.cu_seqlens_q[f.batch] : f.seqlen_q;
    float sum = 0.f;
    for (int batch = 0; batch < batches; ++batch) {
      const int64_t first = batch * f.lse_batch_stride + head * f.lse_head_stride;
      for (int row = threadIdx.x; row < rows; row += kThreads) {
        const float weight = sink == negative_infinity() ? 0.f : ptx::exp2((sink - f.lse[first + row]) * kLog2e);
        if (weight != 0.f) sum = fmaf(weight, -p.statistics[RowStatistics::index(first + row)].delta, sum);
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < C.warps; ++warp) sum += partial[warp];
      p.dsink[head] = sum;
    }
  }

  // Rows that no sequence owns.
  __device__ __forceinline__ void clear_spare_rows(int64_t block, int64_t blocks) const {
    const FwdParams& f = p.fwd;
    const int64_t first_q = f.cu_seqlens_q[f.batch], first_k = f.cu_seqlens_k[f.batch];
    clear(p.dq, p.dq_stride, first_q, p.tokens_q - first_q, f.heads, f.head_dim / 8, block, blocks);
    clear(p.dk, p.dk_stride, first_k, p.tokens_k - first_k, p.heads_kv, f.head_dim / 8, block, blocks);
    clear(p.dv, p.dv_stride, first_k, p.tokens_k - first_k, p.heads_kv, f.v_head_dim / 8, block, blocks);
  }

 private:
  __device__ __forceinline__ void clear(void* gradient, const Strides& stride, int64_t first, int64_t tokens, int heads, int chunks,
                                        int64_t block, int64_t blocks) const {
    const int64_t count = tokens * heads * chunks;
    for (int64_t i = block * kThreads + threadIdx.x; i < count; i += blocks * kThreads) {
      const int64_t row = i / chunks, token = row / heads;
      auto* target = static_cast<uint16_t*>(gradient) + (first + token) * stride.row + (row - token * heads) * stride.head;
      store_8(target + (i - row * chunks) * 8, {0, 0, 0, 0});
    }
  }

  static __device__ __forceinline__ void store_8(uint16_t* target, const uint32_t (&words)[4]) {
    if constexpr (C.aligned) {
      *reinterpret_cast<uint4*>(target) = {words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
};

template <Config C>
__device__ __forceinline__ void backward_postprocess(const BwdParams& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const BackwardPostprocess<C> post{p};
  const int block = blockIdx.x, sinks = p.convert_blocks + p.sink_blocks;
  if (block < p.convert_blocks) {
    post.convert_dq(block);
  } else if (C.learned_sink && block < sinks) {
    post.reduce_dsink(block - p.convert_blocks, reinterpret_cast<float*>(shared));
  } else if (C.varlen) {
    post.clear_spare_rows(block - sinks, gridDim.x - sinks);
  }
}

}  // namespace fa
