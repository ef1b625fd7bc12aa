// Which tile of which head a block computes.
#pragma once

#include "attention/params.cuh"

namespace fa {

struct Work {
  int block_m, head, batch;

  static __device__ __forceinline__ Work none() { return {-1, 0, 0}; }
  __device__ __forceinline__ bool over() const { return block_m < 0; }
};

// Blocks walk the (batch, head) pairs in sections of `section_heads`, and a section from its last rows to its first, all its heads side
// by side. Last rows first is longest first under a causal mask, so that the tail of the grid is made of short tiles; a section is sized so
// that its K and V stay in L2 while all its blocks read them.
__device__ __forceinline__ Work decode_work(const FwdParams& p, int index) {
  const int pairs = p.batch * p.work_heads;
  const int per_section = p.section_heads * p.blocks_m;
  const int section = index / per_section;
  const int first = section * p.section_heads;
  const int width = min(p.section_heads, pairs - first);
  const int rest = index - section * per_section;
  const int row = rest / width;
  const int pair = first + rest - row * width;
  const int batch = pair / p.work_heads;
  return {p.blocks_m - 1 - row, pair - batch * p.work_heads, batch};
}

}  // namespace fa
