// SPDX-License-Identifier: Apache-2.0
// Who computes what in a step whose lengths only the device knows: stream-K
// (https://arxiv.org/abs/2301.03598) over the keys of a KV cache.
//
// A unit of work is block_m rows of one KV head of a sequence, and its tiles are those of the keys
// that some of these rows see. All units stand in one line, in the order of sequence, rows and
// head, and a fixed number of blocks share that line equally. So a block has units of its own, and
// at most two that it shares: one that an earlier block began, one that a later block ends. That
// bounds the partial results by two a block, whatever the lengths.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"

namespace fa {

// What the beginning and the end of a unit cost, in tiles: Q, the first copies, the merge of the
// groups of warps. Without it a block of many short units would be the last one by far.
constexpr int kUnitCost = 4;

// Row blocks (a sequence and block_m of its rows) in order, and where each begins in the line.
// kernels/step.py (schedule_bytes) knows the size.
struct StepSchedule {
  // The line is cut into `blocks` parts: the first `longer` are of share + 1, the others of share.
  struct Head {
    int64_t share;
    int32_t longer, blocks;
    int32_t busy, idle;  // row blocks that see keys, and those with rows that see none
    int64_t unused;
    // Memory that was cleared, or packed sequences without a query.
    __device__ __forceinline__ bool unset() const { return (busy | idle) == 0; }
  };
  // The unit that a part begins in: all that a block has to read before it reads lengths.
  struct Start {
    int64_t begin, cost;
    int32_t busy, head, row_block, unused;
  };
  Head* head;
  Start* start;    // of each part
  int64_t* begin;  // of busy row blocks, and the end of the last one
  // sequence * blocks_m + block of its rows; busy ones from the front, idle ones from the back
  int32_t* row_block;
  int row_blocks;

  __device__ __forceinline__ explicit StepSchedule(const StepParams& p)
      : head(static_cast<Head*>(p.schedule)),
        start(reinterpret_cast<Start*>(head + 1)),
        begin(reinterpret_cast<int64_t*>(start + p.blocks)),
        row_block(reinterpret_cast<int32_t*>(begin + p.cache.fwd.batch * p.cache.fwd.blocks_m + 1)),
        row_blocks(p.cache.fwd.batch * p.cache.fwd.blocks_m) {}

  __device__ __forceinline__ int idle_row_block(int i) const { return row_block[row_blocks - 1 - i]; }
};

// Where part w begins; that is where part w - 1 ends.
__device__ __forceinline__ int64_t begin_of(const StepSchedule::Head& head, int w) { return w * head.share + min(w, head.longer); }
// The part that a place of the line lies in.
__device__ __forceinline__ int part_at(const StepSchedule::Head& head, int64_t at) {
  const int64_t longer = head.longer * (head.share + 1);
  return static_cast<int>(at < longer ? at / (head.share + 1) : head.longer + (at - longer) / head.share);
}

// Tiles [first, end) of a unit.
struct UnitPiece {
  int first, end;
};

// The two partial results of a block: of a unit that an earlier block began, and of one that it
// begins itself and a later block ends.
__device__ __forceinline__ int part_of_block(int w, UnitPiece piece) { return 2 * w + (piece.first == 0); }

// A unit, and the way to the next one.
struct Unit {
  const StepSchedule& line;
  const int heads;  // of k and v
  int busy, head, row_block;
  int64_t begin, cost;

  // The one that part w begins in.
  __device__ __forceinline__ Unit(const StepSchedule& s, int kv_heads, int w) : line(s), heads(kv_heads) {
    const StepSchedule::Start start = line.start[w];
    begin = start.begin, cost = start.cost;
    busy = start.busy, head = start.head, row_block = start.row_block;
  }
  __device__ __forceinline__ int tiles() const { return static_cast<int>(cost) - kUnitCost; }
  __device__ __forceinline__ int64_t end() const { return begin + cost; }

  // What lies between two places of the line.
  __device__ __forceinline__ UnitPiece between(int64_t from, int64_t to) const { return {tile_at(from), tile_at(to)}; }

  // Not behind the last one.
  __device__ __forceinline__ void next() {
    begin += cost;
    if (++head < heads) return;
    head = 0;
    ++busy;
    row_block = line.row_block[busy];
    cost = (line.begin[busy + 1] - begin) / heads;
  }

 private:
  __device__ __forceinline__ int tile_at(int64_t at) const {
    return static_cast<int>(min(max(at - begin - kUnitCost, int64_t{0}), int64_t{tiles()}));
  }
};

}  // namespace fa
