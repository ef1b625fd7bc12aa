// SPDX-License-Identifier: Apache-2.0
// Combines the partial results of units that several blocks of a StepPlan share (step_kvcache.cuh).
#pragma once

#include "attention/head_packing.cuh"
#include "attention/kv_cache.cuh"
#include "attention/step_schedule.cuh"
#include "kernels/split_combine.cuh"

namespace fa {

// Row r of a unit: the part of the block that begins it, then those of the blocks behind it.
template <Config C>
struct StepRow {
  int64_t lse_row, batch, query;
  int head, r, first_block, count;
  __device__ __forceinline__ int pitch(int) const { return C.v_head_dim; }
  __device__ __forceinline__ int64_t at(int i) const {
    const int part = i == 0 ? part_of_block(first_block, {0, 1}) : part_of_block(first_block + i, {1, 2});
    return int64_t{part} * C.block_m + r;
  }
};

// A part of the line has equally many blocks of the grid. Those of the first part that continues a
// unit combine it.
template <Config C>
struct StepCombine {
  static __device__ __forceinline__ void run(const StepParams& params) {
    const KvCacheParams& p = params.cache;
    const FwdParams& f = p.fwd;
    const StepSchedule line(params);
    const StepSchedule::Head head = *line.head;
    const int row_blocks = gridDim.x / params.blocks, w = blockIdx.x / row_blocks;
    if (w == 0 || w >= head.blocks) return;
    const int64_t begin = begin_of(head, w);
    const Unit unit(line, f.work_heads, w);
    const UnitPiece before = unit.between(begin_of(head, w - 1), begin);
    if (before.first != 0 || before.end == 0) return;  // an earlier part begins it, or this one
    const int at = unit.row_block, batch = at / f.blocks_m, first_row = (at - batch * f.blocks_m) * C.block_m;
    const Sequence seq = read_cached_sequence<C>(p, batch);
    const int rows = min(C.block_m, row_count<C>(f, seq) - first_row), count = part_at(head, unit.end() - 1) - w + 2;
    for (int r = blockIdx.x % row_blocks; r < rows; r += row_blocks) {
      const int query = query_of<C>(f, first_row + r), head_q = head_of<C>(f, unit.head, first_row + r);
      const int64_t lse_row = batch * f.lse_batch_stride + head_q * f.lse_head_stride + seq.q_row + query;
      SplitCombine<C>::run(p, StepRow<C>{lse_row, seq.batch, seq.q_row + query, head_q, r, w - 1, count});
      __syncthreads();  // the sums of the warps have been read
    }
  }
};

template <Config C>
__device__ __forceinline__ void step_combine(const StepParams& p) {
  StepCombine<C>::run(p);
}

}  // namespace fa
