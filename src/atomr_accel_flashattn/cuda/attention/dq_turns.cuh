// SPDX-License-Identifier: Apache-2.0
// Deterministic dQ: for each tile of queries a number says how many blocks of keys have added to
// it, and blocks add in the order of their keys.
#pragma once

#include "attention/dq_sum.cuh"
#include "attention/mask.cuh"
#include "ptx/common.cuh"
#include "ptx/turn.cuh"

namespace fa {

// Blocks do not start in the order of blockIdx, and a block that waits for one that cannot start
// before it ends would wait for ever. So blocks draw tickets from a counter, and keys go by
// tickets: a block waits only for such as have begun. The counter is number 0 of the array; those
// of the tiles come behind, by the tile row of dq_sum that they begin with.
//
// Blocks visit their queries from the last to the first. Under a causal mask all of them see the
// last ones, so that each follows the one before it at a tile's distance, and hardly waits. From
// the first to the last, each would wait for all rows before its own.
template <Config C>
struct DqTurns {
  const BwdParams& p;

  // By all threads of a grid: every number, those of rows past max_seqlen_q too. The order of what
  // is added to such rows means nothing, but a block that waited for an old number would wait for
  // ever.
  __device__ __forceinline__ void clear() const {
    const int64_t threads = int64_t{C.warps} * 32, count = 1 + p.dq_tile_rows * p.fwd.heads * (C.varlen ? 1 : p.fwd.batch);
    for (int64_t i = blockIdx.x * threads + threadIdx.x; i < count; i += gridDim.x * threads) p.turns[i] = 0;
  }

  // One for all threads of a block, through four bytes of shared memory.
  static __device__ __forceinline__ int draw_ticket(const BwdParams& p, uint32_t slot) {
    if (threadIdx.x == 0) ptx::store_shared_4(slot, atomicAdd(p.turns, 1));
    __syncthreads();
    return static_cast<int>(ptx::load_shared_4(slot));
  }

  __device__ __forceinline__ int32_t* number_of(const Sequence& seq, int batch, int head, int m) const {
    int64_t row = DqSum<C.varlen>{p}.tile_row(seq, batch, head, m * C.block_m);
    if constexpr (C.varlen) {
      const int64_t last = p.dq_tile_rows * p.fwd.heads - 1;
      row = row < 0 ? 0 : row > last ? last : row;
    }
    return p.turns + 1 + row;
  }

  // Whether `count` blocks have added, and that they have. Nobody looks at the offsets of packed
  // sequences on a GPU: where they are wrong, sequences may overlap, and several share a number. It
  // only rises, so that each block finds what the one before it has left, and none waits for ever.
  static __device__ __forceinline__ bool has(const int32_t* number, int count) {
    const int32_t found = ptx::load_acquire(number);
    return C.varlen ? found >= count : found == count;
  }
  static __device__ __forceinline__ void set(int32_t* number, int count) {
    if constexpr (C.varlen) {
      ptx::raise_release(number, count);
    } else {
      ptx::store_release(number, count);
    }
  }

  // How many blocks add to tile m of queries before block n of keys does, which is one that sees
  // it: blocks from the left bound of the first row on, and those of sink tokens before it.
  __device__ __forceinline__ int blocks_before(const Sequence& seq, int m, int n) const {
    if constexpr (!C.left_bound) return n;
    const int position = m * C.block_m + (seq.length_k - seq.length_q);
    const int first = max(0, position - p.fwd.window_left) / C.block_n;
    if (n < first) return n;
    const int sinks = C.sink_tokens ? (p.fwd.sink_tokens + C.block_n - 1) / C.block_n : 0;
    return n - first + min(sinks, first);
  }
};

}  // namespace fa
