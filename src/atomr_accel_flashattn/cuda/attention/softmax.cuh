// Online softmax over tiles of scores (FlashAttention-2, arXiv 2307.08691, section 3.1), with a lazy rescale of the output.
#pragma once

#include "ptx/common.cuh"

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
  // at most 256 instead of 1, and nothing overflows in f16, bf16 or float32. That is rare after the first tiles, so each lane looks at its own
  // scores, and only where one in the warp has grown so far do the quads exchange maxima. Scores that are no maxima, those of softcap's series,
  // may pass their reference by what f16 holds.
  static constexpr float kLazyGrowth = 8.f, kLargestGrowth = 15.f;

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      max[i / 2][i % 2] = negative_infinity();
      sum[i / 2][i % 2] = 0.f;
    }
  }

  // Scores become unnormalised probabilities in place. Returns, for the whole warp, whether a reference has changed: then `rescale` tells what
  // the output accumulated so far has to be multiplied by. `shift` is what scores of this lane's rows lack where kShifted.
  template <bool kShifted, int kTiles>
  __device__ __forceinline__ bool update(float (&s)[kBlocks][kTiles][4], const float (&shift)[kBlocks][2], float (&rescale)[kBlocks][2],
                                         float factor) {
    float top[kBlocks][2];  // of this lane
    bool grew = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[b][r] = kShifted ? largest(s[b], r) + shift[b][r] : largest(s[b], r);
        grew |= (top[b][r] - max[b][r]) * factor > kLazyGrowth;
      }
    grew = __any_sync(0xffffffffu, grew);
    if (grew) raise(top, rescale, factor);
    accumulate<kShifted>(s, shift, [factor](float x, float reference) { return fmaf(x, factor, -reference * factor); });
    return grew;
  }

  // Scores become unnormalised probabilities in place, against the references as they are. `exponent` takes a score and its reference.
  template <bool kShifted, int kTiles, class Exponent>
  __device__ __forceinline__ void accumulate(float (&s)[kBlocks][kTiles][4], const float (&shift)[kBlocks][2], Exponent exponent) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float seen = max[b][r] == negative_infinity() ? 0.f : max[b][r];  // -inf - 0 stays -inf
        const float reference = kShifted ? seen - shift[b][r] : seen;
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          s[b][t][2 * r] = ptx::exp2(exponent(s[b][t][2 * r], reference));
          s[b][t][2 * r + 1] = ptx::exp2(exponent(s[b][t][2 * r + 1], reference));
          even += s[b][t][2 * r];
          odd += s[b][t][2 * r + 1];
        }
        sum[b][r] += even + odd;
      }
  }

 private:
  __device__ __forceinline__ void raise(const float (&top)[kBlocks][2], float (&rescale)[kBlocks][2], float factor) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float seen = quad_reduce(top[b][r], [](float x, float y) { return fmaxf(x, y); });
        const bool keep = !((seen - max[b][r]) * factor > kLazyGrowth);
        rescale[b][r] = keep ? 1.f : ptx::exp2((max[b][r] - seen) * factor);
        max[b][r] = keep ? max[b][r] : seen;
        sum[b][r] *= rescale[b][r];
      }
  }

  template <int kTiles>
  static __device__ __forceinline__ float largest(const float (&s)[kTiles][4], int r) {
    float m = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) m = fmaxf(m, fmaxf(s[t][2 * r], s[t][2 * r + 1]));
    return m;
  }
};

}  // namespace fa
