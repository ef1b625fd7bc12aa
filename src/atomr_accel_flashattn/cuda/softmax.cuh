// Online softmax over tiles of scores (FlashAttention-2, arXiv 2307.08691, section 3.1), with a lazy rescale of the output.
#pragma once

#include "ptx.cuh"

namespace fa {

constexpr float kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// The four lanes of a quad share a row of an accumulator.
template <class Op>
__device__ __forceinline__ float quad_reduce(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// State of this thread's 2 * kBlocks rows (rows lane / 4 and lane / 4 + 8 of each 16-row block).
template <int kBlocks>
struct OnlineSoftmax {
  float max[kBlocks][2];  // reference maximum, in score units; -inf until a key was seen
  float sum[kBlocks][2];  // this lane's part of the denominator

  // The output is rescaled only when a maximum grew by more than 8 in log2 units: until then the old one is the reference, probabilities reach
  // at most 256 instead of 1, and nothing overflows in f16, bf16 or float32. Skips nearly every rescale after the first tiles.
  static constexpr float kLazyGrowth = 8.f;

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      max[i / 2][i % 2] = negative_infinity();
      sum[i / 2][i % 2] = 0.f;
    }
  }

  // Scores become unnormalised probabilities in place; `rescale` tells what the output accumulated so far has to be multiplied by.
  // Returns, for the whole warp, whether any factor differs from 1.
  template <int kTiles>
  __device__ __forceinline__ bool update(float (&s)[kBlocks][kTiles][4], float (&rescale)[kBlocks][2], float factor) {
    bool grew = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float seen = fmaxf(max[b][r], row_max(s[b], r));
        const bool keep = (seen - max[b][r]) * factor <= kLazyGrowth || seen == negative_infinity();
        rescale[b][r] = keep ? 1.f : ptx::exp2((max[b][r] - seen) * factor);
        grew |= !keep;
        max[b][r] = keep ? max[b][r] : seen;
        sum[b][r] = fmaf(sum[b][r], rescale[b][r], exponentiate(s[b], r, factor, reference(b, r) * factor));
      }
    }
    return __any_sync(0xffffffffu, grew);
  }

  // A row that has seen no key yet has no finite maximum; 0 keeps -inf - reference at -inf.
  __device__ __forceinline__ float reference(int b, int r) const { return max[b][r] == negative_infinity() ? 0.f : max[b][r]; }

 private:
  template <int kTiles>
  static __device__ __forceinline__ float row_max(const float (&s)[kTiles][4], int r) {
    float m = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) m = fmaxf(m, fmaxf(s[t][2 * r], s[t][2 * r + 1]));
    return quad_reduce(m, [](float a, float b) { return fmaxf(a, b); });
  }

  template <int kTiles>
  static __device__ __forceinline__ float exponentiate(float (&s)[kTiles][4], int r, float factor, float reference) {
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      s[t][2 * r] = ptx::exp2(fmaf(s[t][2 * r], factor, -reference));
      s[t][2 * r + 1] = ptx::exp2(fmaf(s[t][2 * r + 1], factor, -reference));
      even += s[t][2 * r];
      odd += s[t][2 * r + 1];
    }
    return even + odd;
  }
};

}  // namespace fa
