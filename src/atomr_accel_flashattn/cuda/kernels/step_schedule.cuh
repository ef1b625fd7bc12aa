// SPDX-License-Identifier: Apache-2.0
// The schedule of a step (attention/step_schedule.cuh), from the lengths that the device knows. One
// block, once for all layers.
#pragma once

#include "attention/kv_cache.cuh"
#include "attention/step_schedule.cuh"

namespace fa {

template <Config C>
struct MakeStepSchedule {
  static constexpr int kThreads = 32 * C.warps;

  // Of the row blocks of a thread, then of all before them.
  struct Totals {
    int64_t cost;
    int32_t busy, idle;
    __device__ __forceinline__ Totals operator+(const Totals& x) const { return {cost + x.cost, busy + x.busy, idle + x.idle}; }
  };

  static __device__ __forceinline__ Totals* shared_totals() {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<Totals*>(shared);
  }

  // Its part of the line, and whether it is busy or idle: neither without rows.
  static __device__ __forceinline__ Totals look_at(const KvCacheParams& p, int row_block) {
    const int batch = row_block / p.fwd.blocks_m, first_row = (row_block - batch * p.fwd.blocks_m) * C.block_m;
    const Sequence seq = read_cached_sequence<C>(p, batch);
    if (first_row >= row_count<C>(p.fwd, seq)) return {0, 0, 0};
    const int tiles = key_tile_count(Band<C>(p.fwd, seq, first_row, C.block_m));
    if (tiles == 0) return {0, 0, 1};
    return {int64_t{tiles + kUnitCost} * p.fwd.work_heads, 1, 0};
  }

  // The sum of what the threads before this one bring; `all`: of all threads.
  static __device__ __forceinline__ Totals sum_before(const Totals& own, Totals& all) {
    Totals* totals = shared_totals();
    const int thread = threadIdx.x;
    Totals sum = own;
    for (int step = 1; step < kThreads; step *= 2) {
      totals[thread] = sum;
      __syncthreads();
      if (thread >= step) sum = sum + totals[thread - step];
      __syncthreads();
    }
    totals[thread] = sum;
    __syncthreads();
    all = totals[kThreads - 1];
    return thread == 0 ? Totals{} : totals[thread - 1];
  }

  // A block for each unit, and more where units are long; never more than there are.
  static __device__ __forceinline__ StepSchedule::Head cut(const StepParams& p, const Totals& all) {
    const int64_t units = int64_t{all.busy} * p.cache.fwd.work_heads, wanted = max(units, (all.cost + p.least_cost - 1) / p.least_cost);
    const int blocks = static_cast<int>(min(wanted, int64_t{p.blocks}));
    const int64_t share = blocks > 0 ? all.cost / blocks : 0;
    return {share, static_cast<int32_t>(all.cost - share * blocks), blocks, all.busy, all.idle, 0};
  }

  static __device__ __forceinline__ void run(const StepParams& p) {
    const StepSchedule line(p);
    const int each = (line.row_blocks + kThreads - 1) / kThreads;
    const int from = min(line.row_blocks, static_cast<int>(threadIdx.x) * each), to = min(line.row_blocks, from + each);
    Totals own{}, all;
    for (int i = from; i < to; ++i) own = own + look_at(p.cache, i);
    Totals at = sum_before(own, all);
    for (int i = from; i < to; ++i) {
      const Totals found = look_at(p.cache, i);
      if (found.busy != 0) {
        line.begin[at.busy] = at.cost;
        line.row_block[at.busy] = i;
      } else if (found.idle != 0) {
        line.row_block[line.row_blocks - 1 - at.idle] = i;
      }
      at = at + found;
    }
    const StepSchedule::Head head = cut(p, all);
    if (threadIdx.x == 0) {
      line.begin[head.busy] = all.cost;
      *line.head = head;
    }
    __syncthreads();  // the line is written
    for (int w = threadIdx.x; w < head.blocks; w += kThreads) {
      const int64_t place = begin_of(head, w);
      const int busy = busy_at(line, head, place), heads = p.cache.fwd.work_heads;
      const int64_t begin = line.begin[busy], cost = (line.begin[busy + 1] - begin) / heads;
      const int kv_head = static_cast<int>((place - begin) / cost);
      line.start[w] = {begin + kv_head * cost, cost, busy, kv_head, line.row_block[busy], 0};
    }
  }

 private:
  // The last busy row block that begins at `at` or before.
  static __device__ __forceinline__ int busy_at(const StepSchedule& line, const StepSchedule::Head& head, int64_t at) {
    int low = 0, high = head.busy;
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (line.begin[middle] <= at ? low : high) = middle;
    }
    return low;
  }
};

template <Config C>
__device__ __forceinline__ void step_schedule(const StepParams& p) {
  MakeStepSchedule<C>::run(p);
}

}  // namespace fa
