// SPDX-License-Identifier: Apache-2.0
// Online softmax (FlashAttention-2, arXiv 2307.08691, section 3.1) with lazy rescaling of the
// output.
#pragma once

#include "ptx/common.cuh"
#include "ptx/types.cuh"

namespace fa {

constexpr float kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// The four lanes of a quad share a row of an accumulator.
template <class Op>
__device__ __forceinline__ float quad_reduce(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Range of P, in log2 units. p is 2^(score - max + kOffset), and up to kRescaleThreshold more with
// lazy rescaling; kOverflowThreshold: the same for scores of which no maximum is taken.
template <DType kP>
struct ProbabilityRange {
  static constexpr float kOffset = 0.f, kRescaleThreshold = 8.f, kOverflowThreshold = 15.f;
  static constexpr bool kGrowsOften = false;  // maxima are raised in each tile, without a branch
};
// fp8 has few small numbers: the largest P is as large a power of two as fits. e4m3 ends at 448,
// e5m2 at 57344. Any growth beyond rounding raises the maximum, so that its own P is not rounded,
// which counts where one key outweighs all others, and none clips.
template <>
struct ProbabilityRange<DType::F8E4M3> {
  static constexpr float kOffset = 8.f, kRescaleThreshold = 1.f / 256.f, kOverflowThreshold = 1.f / 256.f;
  static constexpr bool kGrowsOften = true;
};
template <>
struct ProbabilityRange<DType::F8E5M2> {
  static constexpr float kOffset = 15.f, kRescaleThreshold = 1.f / 256.f, kOverflowThreshold = 1.f / 256.f;
  static constexpr bool kGrowsOften = true;
};

// P in f16 where Q is bf16: small numbers as far down as they go.
struct WideRange {
  static constexpr float kOffset = 8.f, kRescaleThreshold = 7.f, kOverflowThreshold = 7.f;
  static constexpr bool kGrowsOften = false;
};

// State of this lane's 2 * kBlocks rows: lane / 4 and lane / 4 + 8 of each 16-row block.
template <int kBlocks, class Range = ProbabilityRange<DType::F16>>
struct OnlineSoftmax {
  float max[kBlocks][2];  // reference maximum, in score units; -inf before the first visible key
  float sum[kBlocks][2];  // this lane's part of the denominator

  // Lazy rescale: the output is rescaled only if a maximum grew by more than 8 in log2 units. Until
  // then the old one stays the reference, and probabilities reach 256 instead of 1, which f16, bf16
  // and float32 hold. That is rare after the first tiles: each lane compares its own scores, and
  // the quads exchange maxima only if some lane of the warp exceeded the threshold (fp8:
  // raise_often()). Scores of the polynomial softcap, of which no maximum is taken, may exceed
  // their reference by 15: f16 holds it.
  static constexpr float kRescaleThreshold = Range::kRescaleThreshold, kOverflowThreshold = Range::kOverflowThreshold;

  // Huge scores: the exponent is one FMA, x * factor - round(max * factor). What that rounding
  // drops is common to a row and cancels in the normalisation, unless it is large: 2^-13 at this
  // limit in log2 units, which shows in no output, and 64 at 2^30, which overflows. Beyond the
  // limit, scores become differences to their reference first, which is exact for equal scores.
  // Such a warp looks at every tile (look_above is -inf; fp8 always does), others pay nothing: a
  // branch around the exponentials would cost 3 to 5 % at d 64 and 128, because they move below the
  // wait of wgmma.
  static constexpr float kLargestFused = 2048.f;
  float look_above = kRescaleThreshold;

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      max[i / 2][i % 2] = negative_infinity();
      sum[i / 2][i % 2] = 0.f;
    }
  }

  // In place: scores to unnormalised probabilities. Returns whether a reference maximum changed,
  // which anywhere() makes warp-uniform; `rescale` is then the factor of the output accumulated so
  // far, and with kGrowsOften in any case. With kHasRowBias, `row_bias` is a per-row bias not yet
  // added to the scores; it is folded into the maximum and the exponent. `decides` says of a row
  // whether it is the sequence's own.
  template <bool kHasRowBias, int kTiles, class Decides>
  __device__ __forceinline__ bool update(float (&s)[kBlocks][kTiles][4], const float (&row_bias)[kBlocks][2], float (&rescale)[kBlocks][2],
                                         float factor, Decides decides) {
    bool grew = false, differences = false;
    if constexpr (Range::kGrowsOften) {
      grew = raise_often<kHasRowBias>(s, row_bias, rescale, factor, decides, differences);
    } else {
      float top[kBlocks][2];  // of this lane
      bool look = false;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          top[b][r] = top_of<kHasRowBias>(s, row_bias, b, r);
          look |= (top[b][r] - max[b][r]) * factor > look_above;
        }
      if (__any_sync(0xffffffffu, look)) {
        grew = raise_max(top, rescale, factor);
        differences = any_huge(factor, decides);
        look_above = differences ? negative_infinity() : kRescaleThreshold;
        if (differences) subtract_reference<kHasRowBias>(s, row_bias);
      }
    }
    accumulate<kHasRowBias>(s, row_bias, differences,
                            [factor](float x, float reference) { return fmaf(x, factor, addend(reference, factor)); });
    return grew;
  }

  // Of what update() returned: whether a reference of the warp changed.
  static __device__ __forceinline__ bool anywhere(bool grew) { return Range::kGrowsOften ? __any_sync(0xffffffffu, grew) : grew; }

  // What is in units of 2^kOffset, as P, its sums and O.
  static __device__ __forceinline__ float without_offset(float x) {
    if constexpr (Range::kOffset == 0.f) return x;
    return x / (1 << static_cast<int>(Range::kOffset));
  }

  // What `sum` is a sum of 2^(score - ...) of, in log2 units.
  __device__ __forceinline__ float reference_log2(int b, int r, float factor) const {
    if constexpr (Range::kOffset == 0.f) return max[b][r] * factor;
    return fmaf(max[b][r], factor, -Range::kOffset);
  }

  // update() of batch-invariant kernels: what becomes of a row depends on that row alone, and on no
  // compiler. Exponents are differences to the reference for all scores, not only beside a row of
  // huge ones, and products are rounded before sums. A row that sees nothing of the tile stays as
  // it is, bit for bit: its probabilities are 0 and its factor is 1.
  template <int kTiles>
  __device__ __forceinline__ bool update_each_row(float (&s)[kBlocks][kTiles][4], float (&rescale)[kBlocks][2], float factor) {
    float top[kBlocks][2];  // of this lane
    bool look = false, grew = false;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      top[i / 2][i % 2] = row_max(s[i / 2], i % 2);
      look |= (top[i / 2][i % 2] - max[i / 2][i % 2]) * factor > kRescaleThreshold;
    }
    // Raises just the rows of which a lane looked, whichever row of the warp that was.
    if (__any_sync(0xffffffffu, look)) grew = raise_max(top, rescale, factor);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float reference = max[b][r] == negative_infinity() ? 0.f : max[b][r];
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          s[b][t][2 * r] = ptx::exp2(with_offset(__fmul_rn(__fsub_rn(s[b][t][2 * r], reference), factor)));
          s[b][t][2 * r + 1] = ptx::exp2(with_offset(__fmul_rn(__fsub_rn(s[b][t][2 * r + 1], reference), factor)));
          even = __fadd_rn(even, s[b][t][2 * r]);
          odd = __fadd_rn(odd, s[b][t][2 * r + 1]);
        }
        sum[b][r] = __fadd_rn(sum[b][r], __fadd_rn(even, odd));
      }
    return grew;
  }

  // In place: scores, or their differences to the references, to unnormalised probabilities.
  // `exponent` takes a score and its reference.
  template <bool kHasRowBias, int kTiles, class Exponent>
  __device__ __forceinline__ void accumulate(float (&s)[kBlocks][kTiles][4], const float (&row_bias)[kBlocks][2], bool differences,
                                             Exponent exponent) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // No key seen yet: -inf - 0 stays -inf.
        const float seen = max[b][r] == negative_infinity() || differences ? 0.f : max[b][r];
        const float reference = kHasRowBias && !differences ? seen - row_bias[b][r] : seen;
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
  static __device__ __forceinline__ float with_offset(float x) {
    if constexpr (Range::kOffset == 0.f) return x;
    return __fadd_rn(x, Range::kOffset);
  }
  static __device__ __forceinline__ float addend(float reference, float factor) {
    if constexpr (Range::kOffset == 0.f) return -reference * factor;
    return fmaf(-reference, factor, Range::kOffset);
  }

  // Whether a reference is beyond the limit; -inf is none yet.
  static __device__ __forceinline__ bool is_huge(float reference, float factor) {
    return fabsf(reference * factor) > kLargestFused && reference != negative_infinity();
  }

  // Whether a row of the warp that decides has such a one. (Not by is_huge(), after which ptxas
  // orders 16-bit kernels otherwise.)
  template <class Decides>
  __device__ __forceinline__ bool any_huge(float factor, Decides decides) const {
    bool huge = false;
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) {
      const float reference = max[i / 2][i % 2];
      huge |= fabsf(reference * factor) > kLargestFused && reference != negative_infinity() && decides(i / 2, i % 2);
    }
    return __any_sync(0xffffffffu, huge);
  }

  template <bool kHasRowBias, int kTiles>
  __device__ __forceinline__ void subtract_reference(float (&s)[kBlocks][kTiles][4], const float (&row_bias)[kBlocks][2]) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float seen = max[b][r] == negative_infinity() ? 0.f : max[b][r];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) s[b][t][e] = (kHasRowBias ? s[b][t][e] + row_bias[b][r] : s[b][t][e]) - seen;
      }
  }

  // Raises the references that grew, with the sums; returns, warp-uniformly, whether one did.
  __device__ __forceinline__ bool raise_max(const float (&top)[kBlocks][2], float (&rescale)[kBlocks][2], float factor) {
    bool grew = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) grew |= raise(b, r, quad_max(top[b][r]), rescale, factor);
    return __any_sync(0xffffffffu, grew);
  }

  // Raises references where some row of a warp grows in most tiles, so that a branch around it
  // would be taken more often than not: quads exchange maxima in all tiles, and `rescale` is 1
  // where none grew. The vote beside that is for rows of which top_by_bits() does not say enough,
  // and for huge ones. `differences`: scores became those to their references. Returns whether a
  // row of this lane grew.
  template <bool kHasRowBias, int kTiles, class Decides>
  __device__ __forceinline__ bool raise_often(float (&s)[kBlocks][kTiles][4], const float (&row_bias)[kBlocks][2],
                                              float (&rescale)[kBlocks][2], float factor, Decides decides, bool& differences) {
    float seen[kBlocks][2];
    bool unusual = false, grew = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float top = kHasRowBias ? top_of<true>(s, row_bias, b, r) : top_by_bits(s[b], r);
        if constexpr (!kHasRowBias) unusual |= top < 0.f && max[b][r] < 0.f;
        seen[b][r] = fmaxf(top, max[b][r]);
        unusual |= is_huge(seen[b][r], factor) && decides(b, r);
      }
    unusual = __any_sync(0xffffffffu, unusual);
#pragma unroll
    for (int i = 0; i < kBlocks * 2; ++i) seen[i / 2][i % 2] = quad_max(seen[i / 2][i % 2]);
    if (unusual) {
      bool huge = false;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          seen[b][r] = quad_max(fmaxf(top_of<kHasRowBias>(s, row_bias, b, r), max[b][r]));
          huge |= is_huge(seen[b][r], factor) && decides(b, r);
        }
      differences = __any_sync(0xffffffffu, huge);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) grew |= raise(b, r, seen[b][r], rescale, factor);
    if (differences) subtract_reference<kHasRowBias>(s, row_bias);
    return grew;
  }

  // Whether the reference grew.
  __device__ __forceinline__ bool raise(int b, int r, float seen, float (&rescale)[kBlocks][2], float factor) {
    const bool keep = !((seen - max[b][r]) * factor > kRescaleThreshold);
    rescale[b][r] = keep ? 1.f : ptx::exp2((max[b][r] - seen) * factor);
    max[b][r] = keep ? max[b][r] : seen;
    sum[b][r] *= rescale[b][r];
    return !keep;
  }

  static __device__ __forceinline__ float quad_max(float x) {
    return quad_reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }

  // The largest score of a row in this lane.
  template <bool kHasRowBias, int kTiles>
  static __device__ __forceinline__ float top_of(const float (&s)[kBlocks][kTiles][4], const float (&row_bias)[kBlocks][2], int b, int r) {
    return kHasRowBias ? row_max(s[b], r) + row_bias[b][r] : row_max(s[b], r);
  }

  // The largest number of a row as integers compare, three in an instruction: the maximum where
  // that is 0 or above, else some number below 0. That will do where the reference is 0 or above.
  template <int kTiles>
  static __device__ __forceinline__ float top_by_bits(const float (&s)[kTiles][4], int r) {
    const auto larger = [](int x, int y) { return x > y ? x : y; };
    int m[2] = {__float_as_int(s[0][2 * r]), __float_as_int(s[0][2 * r + 1])};  // of two chains
#pragma unroll
    for (int t = 1; t < kTiles; ++t) m[t % 2] = larger(larger(m[t % 2], __float_as_int(s[t][2 * r])), __float_as_int(s[t][2 * r + 1]));
    return __int_as_float(larger(m[0], m[1]));
  }

  template <int kTiles>
  static __device__ __forceinline__ float row_max(const float (&s)[kTiles][4], int r) {
    float m = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) m = fmaxf(m, fmaxf(s[t][2 * r], s[t][2 * r + 1]));
    return m;
  }
};

}  // namespace fa
