// SPDX-License-Identifier: Apache-2.0
// After the backward: dQ from its float32 accumulator, the gradient of a learned sink, and zeros in
// the rows that no sequence owns. Blocks do one of the three.
#pragma once

#include "attention/config.cuh"
#include "attention/score.cuh"
#include "attention/sequence.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

template <Config C>
struct BackwardPostprocess {
  static constexpr int kThreads = C.warps * 32;
  const BwdParams& p;

  // Eight columns a thread, scaled; 0 where no sequence owns the row.
  __device__ __forceinline__ void convert_dq(int64_t block) const {
    const FwdParams& f = p.fwd;
    const int chunks = f.head_dim / 8;
    const int64_t index = block * kThreads + threadIdx.x, row = index / chunks, token = row / f.heads;
    if (token >= p.tokens_q) return;
    const int col = static_cast<int>(index - row * chunks) * 8, head = static_cast<int>(row - token * f.heads);
    const int64_t batch = C.varlen ? 0 : token / f.seqlen_q;
    const bool owned = !C.varlen || token < f.cu_seqlens_q[f.batch];
    const float* sum = p.dq_sum + row * f.head_dim + col;
    uint32_t words[4] = {0, 0, 0, 0};
    if (owned) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = MmaTraits<C.dtype>::pack(sum[2 * i] * p.softmax_scale, sum[2 * i + 1] * p.softmax_scale);
    }
    const int64_t at = C.varlen ? token : token - batch * f.seqlen_q;
    store_8(static_cast<uint16_t*>(p.dq) + batch * p.dq_stride.batch + at * p.dq_stride.row + head * p.dq_stride.head + col, words);
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
        if (weight != 0.f) sum = fmaf(weight, -p.delta[first + row], sum);
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

  // Rows of dK and dV that no sequence owns.
  __device__ __forceinline__ void clear_spare_keys(int64_t block, int64_t blocks) const {
    const int64_t first = p.fwd.cu_seqlens_k[p.fwd.batch];
    clear(p.dk, p.dk_stride, first, p.fwd.head_dim / 8, block, blocks);
    clear(p.dv, p.dv_stride, first, p.fwd.v_head_dim / 8, block, blocks);
  }

 private:
  __device__ __forceinline__ void clear(void* gradient, const Strides& stride, int64_t first, int chunks, int64_t block,
                                        int64_t blocks) const {
    const int64_t count = (p.tokens_k - first) * p.heads_kv * chunks;
    for (int64_t i = block * kThreads + threadIdx.x; i < count; i += blocks * kThreads) {
      const int64_t row = i / chunks, token = row / p.heads_kv;
      auto* target = static_cast<uint16_t*>(gradient) + (first + token) * stride.row + (row - token * p.heads_kv) * stride.head;
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
    post.clear_spare_keys(block - sinks, gridDim.x - sinks);
  }
}

}  // namespace fa
