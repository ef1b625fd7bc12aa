// SPDX-License-Identifier: Apache-2.0
// After the backward: dQ from its float32 accumulator, dK and dV where blocks have left parts of
// them, the gradient of a learned sink, and zeros in the rows that no sequence owns. Blocks do one
// of the four.
#pragma once

#include "attention/dq_sum.cuh"
#include "attention/epilogue.cuh"
#include "attention/kv_parts.cuh"
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
      load(x, tile, group, f.head_dim);
      store(x, out, p.dq_stride, row, seq.length_q, lane_row, group, f.head_dim, p.softmax_scale);
    }
  }

  // Of add_parts().
  __device__ __forceinline__ int kv_blocks() const { return (p.fwd.seqlen_k + C.block_m - 1) / C.block_m * p.fwd.batch * p.heads_kv; }
  // dK and dV of block_m keys of one KV head and sequence, from the parts of all its query heads.
  __device__ __forceinline__ void add_parts(int block) const {
    const FwdParams& f = p.fwd;
    const int blocks_n = (f.seqlen_k + C.block_m - 1) / C.block_m;
    const int pair = block / blocks_n, first_row = (block - pair * blocks_n) * C.block_m;
    const int batch = pair / p.heads_kv, head = pair - batch * p.heads_kv;
    const Sequence seq = read_sequence<C.varlen>(f, batch);
    const KvParts<C.varlen> parts{p};
    const int groups_k = (f.head_dim + 31) / 32, groups = groups_k + (f.v_head_dim + 31) / 32;
    for (int i = warp_index(); i < C.block_m / 16 * groups; i += C.warps) {
      const int tile_row = i / groups, group = i - tile_row * groups, row = first_row + 16 * tile_row;
      if (row >= seq.length_k) break;
      const bool of_k = group < groups_k;
      const int cols = of_k ? f.head_dim : f.v_head_dim, number = of_k ? group : group - groups_k;
      const float* tile =
          parts.tile(seq, batch, head * p.head_splits, row) + (4 * number + (of_k ? 0 : f.head_dim / parts.kCols)) * parts.kTile;
      float x[4][4] = {};
      for (int part = 0; part < p.head_splits; ++part, tile += parts.part_stride()) {
        float one[4][4] = {};
        load(one, tile, number, cols);
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i / 4][i % 4] += one[i / 4][i % 4];
      }
      const Strides& stride = of_k ? p.dk_stride : p.dv_stride;
      auto* out = static_cast<uint16_t*>(of_k ? p.dk : p.dv) + seq.batch * stride.batch + seq.k_row * stride.row + head * stride.head;
      store(x, out, stride, row, seq.length_k, threadIdx.x % 32 / 4, number, cols, of_k ? p.softmax_scale : f.dropout_rescale);
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
  // 16 rows x 32 columns of a sum, from the first tile on, of which `cols` columns are left.
  static __device__ __forceinline__ void load(float (&x)[4][4], const float* tile, int group, int cols) {
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (32 * group + 8 * t < cols) ptx::load_global_fragment(x[t], tile + t * SumTile::kTile);
  }

  // Scaled, to columns [32 group, 32 group + 32) of rows from `row` on, of which there are `rows`.
  static __device__ __forceinline__ void store(const float (&x)[4][4], uint16_t* out, const Strides& stride, int row, int rows,
                                               int lane_row, int group, const int32_t& cols, const float& scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) words[t] = MmaTraits<C.dtype>::pack(x[t][2 * r] * scale, x[t][2 * r + 1] * scale);
      transpose_quad(words);
      const int at = row + 8 * r + lane_row;
      if (at < rows) store_quad<C>(out + at * stride.row, 32 * group, cols, words);
    }
  }

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
  const int block = blockIdx.x, sinks = p.convert_blocks + p.sink_blocks, spare = C.head_split ? sinks + post.kv_blocks() : sinks;
  if (block < p.convert_blocks) {
    post.convert_dq(block);
  } else if (C.learned_sink && block < sinks) {
    post.reduce_dsink(block - p.convert_blocks, reinterpret_cast<float*>(shared));
  } else if (C.head_split && block < spare) {
    post.add_parts(block - sinks);
  } else if (C.varlen) {
    post.clear_spare_rows(block - spare, gridDim.x - spare);
  }
}

}  // namespace fa
