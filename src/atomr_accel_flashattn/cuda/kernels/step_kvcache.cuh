// SPDX-License-Identifier: Apache-2.0
// Forward attention over a cache of K and V (fa2_kvcache.cuh) in the blocks of a StepPlan: block w
// computes part w of the line of a schedule (attention/step_schedule.cuh).
#pragma once

#include "attention/step_schedule.cuh"
#include "kernels/fa2_kvcache.cuh"

namespace fa {

// Rows that see no key: o = 0, and the LSE is -inf or the learned sink. A warp writes a row block.
// `add`: to o and the LSE, 0 or NaN.
template <Config C>
__device__ __forceinline__ void write_idle_rows(const FwdParams& p, int batch, int block_m, float add) {
  const Sequence seq = rows_of_sequence<C>(p, batch, 0);
  constexpr int kChunks = C.v_head_dim / 8;
  const int first = block_m * C.block_m, rows = min(C.block_m, row_count<C>(p, seq) - first);
  for (int i = threadIdx.x % 32; i < p.work_heads * rows * kChunks; i += 32) {
    const int chunk = i % kChunks, pair = i / kChunks, kv_head = pair / rows, row = first + pair - kv_head * rows;
    const int query = query_of<C>(p, row), head = head_of<C>(p, kv_head, row);
    const RowResult end = finalize_row<C>(0.f, negative_infinity(), C.learned_sink ? p.learned_sink[head] * kLog2e : 0.f);
    if (p.lse != nullptr && chunk == 0) p.lse[batch * p.lse_batch_stride + head * p.lse_head_stride + seq.q_row + query] = end.lse + add;
    auto* o =
        static_cast<Bits<C.out_dtype>*>(p.o) + seq.batch * p.o_stride.batch + (seq.q_row + query) * p.o_stride.row + head * p.o_stride.head;
    // NaN where the sink is NaN.
    const float zero = 0.f * end.scale + add;
    if constexpr (C.aligned && C.out_dtype != DType::F32) {
      const uint32_t zeros = MmaTraits<C.out_dtype>::pack(zero, zero);
      if (8 * chunk < p.v_head_dim) *reinterpret_cast<uint4*>(o + 8 * chunk) = {zeros, zeros, zeros, zeros};
    } else {
#pragma unroll
      for (int col = 0; col < 8; col += 2) store_two<C>(o, 8 * chunk + col, p.v_head_dim, zero, zero);
    }
  }
}

// Row blocks without keys, and what is wrong with lengths, of all sequences: those without queries
// are in no unit. A warp takes a row block, so that its reads do not wait for those of others.
// Before the first schedule all rows are NaN.
template <Config C>
__device__ __forceinline__ void finish_idle(const KvCacheParams& p, const StepSchedule& line, const StepSchedule::Head& head) {
  const FwdParams& f = p.fwd;
  const int first = blockIdx.x + gridDim.x * (threadIdx.x / 32), step = gridDim.x * C.warps;
  const bool unset = head.unset();
  const int count = unset ? line.row_blocks : head.idle;
  for (int i = first; i < count; i += step) {
    const int at = unset ? i : line.idle_row_block(i), batch = at / f.blocks_m;
    write_idle_rows<C>(f, batch, at - batch * f.blocks_m, unset ? __int_as_float(0x7fffffff) : 0.f);
  }
  if (p.error == nullptr) return;
  for (int batch = blockIdx.x + gridDim.x * threadIdx.x; batch < f.batch; batch += gridDim.x * 32 * C.warps) {
    const CachedLength length(p, batch);
    check_cached_sequence<C>(p, batch, length.before, length.used, p.left_pad == nullptr ? 0 : p.left_pad[batch]);
  }
}

template <Config C, class Descales = NoDescales<C>>
__device__ __forceinline__ void step_kvcache(const StepParams& params, const Descales& descales = {}) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const KvCacheParams& p = params.cache;
  const FwdParams& f = p.fwd;
  const StepSchedule line(params);
  const StepSchedule::Head head = *line.head;
  const int w = blockIdx.x, blocks = gridDim.x;

  // First, as these stores go on while keys are on their way.
  write_unowned_rows<C>(f, w, blocks, threadIdx.x, 32 * C.warps);
  finish_idle<C>(p, line, head);

  if (w >= head.blocks) return;
  const int64_t begin = begin_of(head, w), end = begin_of(head, w + 1);
  for (Unit unit(line, f.work_heads, w);; unit.next()) {
    const UnitPiece piece = unit.between(begin, end);
    if (piece.first < piece.end) {
      const int at = unit.row_block, batch = at / f.blocks_m, block_m = at - batch * f.blocks_m;
      const bool whole = piece.first == 0 && piece.end == unit.tiles();
      const int part = whole ? -1 : part_of_block(w, piece);
      const Sequence seq = read_cached_sequence<C>(p, batch);
      Fa2KvCache<C, Descales>(p, {block_m, unit.head, batch}, seq, ptx::shared_address(shared), descales).run(piece.first, piece.end, part);
    }
    if (unit.end() >= end) return;
    __syncthreads();  // the merge has been read, whose memory takes the next keys
  }
}

}  // namespace fa
