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

// A warp combines a row of the LSE: its sequence, head and query.
template <Config C>
__device__ __forceinline__ void split_combine(const KvCacheParams& p) {
  const FwdParams& f = p.fwd;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * C.warps + warp_index();
  if (row >= p.lse_rows) return;
  const int64_t rows_of_batch = C.varlen ? p.lse_rows : f.lse_batch_stride;
  const int64_t batch = row / rows_of_batch, rest = row - batch * rows_of_batch, head = rest / f.lse_head_stride;
  const int64_t query = rest - head * f.lse_head_stride;  // packed: a row of q
  const bool owned = !C.varlen || query < f.cu_seqlens_q[f.batch];

  float top = negative_infinity();
  if (owned)
    for (int split = lane; split < p.splits; split += 32) top = fmaxf(top, p.partial_lse[split * p.lse_rows + row]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float sink = C.learned_sink && owned ? f.learned_sink[head] : negative_infinity();
  top = fmaxf(top, sink);
  const bool empty = top == negative_infinity();
  float sum = C.learned_sink && !empty ? ptx::exp2((sink - top) * kLog2e) : 0.f;

  // Lanes take eight columns each.
  constexpr int kChunks = C.v_head_dim / 8;
  float o[8] = {};
  for (int split = 0; split < p.splits && !empty; ++split) {
    const int64_t at = split * p.lse_rows + row;
    const float lse = p.partial_lse[at];
    if (lse == negative_infinity()) continue;
    const float weight = ptx::exp2((lse - top) * kLog2e);
    sum += weight;
    if (lane < kChunks && 8 * lane < f.v_head_dim) {
      const auto* part = reinterpret_cast<const float4*>(p.partial_o + at * f.v_head_dim + 8 * lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 x = part[i];
        o[4 * i] = fmaf(weight, x.x, o[4 * i]), o[4 * i + 1] = fmaf(weight, x.y, o[4 * i + 1]);
        o[4 * i + 2] = fmaf(weight, x.z, o[4 * i + 2]), o[4 * i + 3] = fmaf(weight, x.w, o[4 * i + 3]);
      }
    }
  }
  const float scale = sum == 0.f ? 0.f : ptx::reciprocal(sum);
  if (f.lse != nullptr && lane == 0) f.lse[row] = sum == 0.f ? negative_infinity() : top + ptx::log2(sum) * kLn2;
  if (lane >= kChunks) return;
  auto* out = static_cast<uint16_t*>(f.o) + (C.varlen ? 0 : batch * f.o_stride.batch) + query * f.o_stride.row + head * f.o_stride.head;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store_pair<C>(out, 8 * lane + 2 * i, f.v_head_dim, MmaTraits<C.dtype>::pack(o[2 * i] * scale, o[2 * i + 1] * scale));
}

}  // namespace fa
