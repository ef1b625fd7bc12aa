// SPDX-License-Identifier: Apache-2.0
// Before the backward: delta = rowsum(dO * O) - dLSE (FlashAttention-2, Algorithm 2, line 4), and
// zeros in the accumulator of dQ. A warp takes a row at a time.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"
#include "tile/warp.cuh"

namespace fa {

template <Config C>
struct BackwardPreprocess {
  const BwdParams& p;
  const Sequence seq;
  const int batch, head;

  __device__ __forceinline__ void run(int first_row) const {
    for (int row = first_row + warp_index(); row < min(first_row + C.block_m, seq.length_q); row += C.warps) process(row);
  }

 private:
  __device__ __forceinline__ void process(int row) const {
    const FwdParams& f = p.fwd;
    const int lane = threadIdx.x % 32;
    const int64_t at = batch * f.lse_batch_stride + head * f.lse_head_stride + seq.q_row + row;
    // What a row without keys holds does not count: it may be NaN. Only its dLSE does, with a
    // learned sink.
    const RowRange keys = Band<C>(f, seq, row, 1).keys();
    const bool idle = !(keys.begin < keys.end || keys.sinks > 0) || f.lse[at] == negative_infinity();
    float sum = 0.f;
    if (!idle && p.dout != nullptr) {
      const uint16_t* dout = row_of(p.dout, p.dout_stride, row);
      const uint16_t* out = row_of(f.o, f.o_stride, row);
      for (int col = lane; col < f.v_head_dim; col += 32)
        sum = fmaf(MmaTraits<C.dtype>::widen(dout[col]), MmaTraits<C.dtype>::widen(out[col]), sum);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) {
      const bool counts = p.dlse != nullptr && (C.learned_sink || !idle);
      p.delta[at] = counts ? sum - p.dlse[at] : sum;
    }
    const int64_t token = static_cast<int64_t>(seq.batch) * f.seqlen_q + seq.q_row + row;
    float* dq = p.dq_sum + (token * f.heads + head) * f.head_dim;
    for (int col = lane; col < f.head_dim; col += 32) dq[col] = 0.f;
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
  BackwardPreprocess<C>{p, read_sequence<C.varlen>(p.fwd, batch), batch, head}.run(block_m * C.block_m);
}

}  // namespace fa
