// SPDX-License-Identifier: Apache-2.0
// Writes the dropout pattern as a bool array (batch, heads, seqlen_q, seqlen_k), True where kept,
// False past the lengths of a packed sequence. One thread makes one Philox call: 2 rows and 8 keys
// of a 16 x 32 patch.
#pragma once

#include "attention/dropout.cuh"
#include "attention/sequence.cuh"

namespace fa {

// Blocks of 4 warps, each one 16 x 32 patch; the 4 patches follow each other along the rows.
template <bool kVarlen>
__device__ __forceinline__ void dropout_mask(const DropoutMaskParams& p) {
  const int blocks_k = (p.seqlen_k + 31) / 32, blocks_q = (p.seqlen_q + 63) / 64;
  const int block_k = blockIdx.x % blocks_k;
  const int block_q = blockIdx.x / blocks_k % blocks_q;
  const int pair = blockIdx.x / blocks_k / blocks_q;
  const int batch = pair / p.heads;
  const Sequence seq = read_sequence<kVarlen>(p, batch);

  const int lane = threadIdx.x % 32;
  const int i0 = block_q * 64 + threadIdx.x / 32 * 16 + lane / 4;
  const int j0 = block_k * 32 + lane % 4 * 2;
  const DropoutBytes bytes = {Philox(p.rng)((i0 >> 4) * 8 + (i0 & 7), block_k * 4 + lane % 4, pair)};
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int upper = n / 8, tile = n / 2 % 4, odd = n % 2;
    const int i = i0 + 8 * upper, j = j0 + 8 * tile + odd;
    if (i < p.seqlen_q && j < p.seqlen_k) {
      const bool inside = i < seq.length_q && j < seq.length_k;
      p.keep[(static_cast<int64_t>(pair) * p.seqlen_q + i) * p.seqlen_k + j] = inside && bytes.at(upper, tile, odd) < p.dropout_threshold;
    }
  }
}

}  // namespace fa
