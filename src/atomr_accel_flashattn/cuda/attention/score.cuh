// SPDX-License-Identifier: Apache-2.0
// Score policy: from the raw product q.k to the argument of exp2.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/common.cuh"

namespace fa {

constexpr float kLog2e = 1.4426950408889634f;

// Without softcap, scores stay raw: softmax_scale * log2(e) is folded into the FMA of the exponent.
// The maximum is then taken of raw scores, which needs a positive scale. softcap and scale_first
// (for scales that are not positive, or hardly) bring scores to log2 units first; the factor left
// is 1.
template <Config C>
struct Score {
  static constexpr bool kInLog2 = C.softcap || C.scale_first;
  // Polynomial softcap: tanh takes two special functions an element, which cost more than both
  // products of narrow heads. Where raw scores are small beside the cap, polynomial() replaces it.
  // fp8 has no room above the maximum for scores of which none is taken.
  static constexpr bool kHasPolynomial = C.softcap && !C.alibi && !C.scale_first && bytes_of(C.p_dtype()) > 1;
  static constexpr bool kDescaled = bytes_of(C.k_dtype) == 1;
  // The factors of q and k are in that of the exponent, where raw scores need a positive one.
  static constexpr bool kFoldsDescale = kDescaled && !C.any_ratio && !C.block_descales && !kInLog2;
  float factor;  // from what apply() leaves to log2 units
  float scale, cap_scale, cap;
  float cubic, quintic;  // coefficients of polynomial()
  float slope;           // per key of distance, in the units of apply()

  // `descale`: of raw scores, fp8 only: the factors of q and k.
  __device__ __forceinline__ Score(const FwdParams& p, int batch, int head, float descale = 1.f)
      : factor(kInLog2 ? 1.f : positive(descaled(p.scale_log2, descale))),
        scale(descaled(p.scale_log2, descale)),
        cap_scale(descaled(p.softcap_scale, descale)),
        cap(p.softcap_log2),
        cubic(p.softcap_cubic),
        quintic(p.softcap_quintic),
        slope(0.f) {
    if constexpr (C.alibi && !C.any_ratio) slope = slope_of(p, batch, head, descale);
  }

  static __device__ __forceinline__ float slope_of(const FwdParams& p, int batch, int head, float descale = 1.f) {
    const float slope = p.alibi_slopes[batch * p.alibi_batch_stride + head] * kLog2e;
    return kInLog2 ? slope : slope / positive(descaled(p.scale_log2, descale));
  }

  // `distance` is j - p.
  __device__ __forceinline__ float apply(float s, float distance) const { return apply(s, distance, slope); }
  // With the slope of a row, where rows are of several heads.
  __device__ __forceinline__ float apply(float s, float distance, float slope) const {
    if constexpr (C.softcap) {
      s = cap * tanh(s * cap_scale);
    } else if constexpr (C.scale_first) {
      s *= scale;
    }
    if constexpr (C.alibi) s = fmaf(-slope, fabsf(distance), s);
    return s;
  }

  // A capped score less `reference`, for |s| up to softcap_limit.
  __device__ __forceinline__ float polynomial(float s, float reference) const {
    const float square = s * s;
    return fmaf(s, fmaf(square, fmaf(square, quintic, cubic), scale), -reference);
  }

  // Derivative of the softcap at a raw score.
  __device__ __forceinline__ float cap_slope(float s) const {
    const float t = tanh(s * cap_scale);
    return fmaf(-t, t, 1.f);
  }

 private:
  static __device__ __forceinline__ float descaled(float x, float descale) { return kDescaled ? x * descale : x; }
  // 2^-60 makes every score 0, as a smaller factor would, and is small to no slope. A negative one
  // becomes NaN, and so does o: the largest raw score would be the smallest.
  static __device__ __forceinline__ float positive(float x) {
    constexpr float kLeast = 8.6736174e-19f;
    if constexpr (!kFoldsDescale) return x;
    return x > kLeast ? x : x >= 0.f ? kLeast : __int_as_float(0x7fffffff);
  }

  // 1 - 2 / (e^2x + 1): absolute error about 1e-7, where tanh.approx has 5e-4 and would show in
  // f16. A cap far above the scores multiplies that error, so small arguments take the Taylor
  // series: relative error below 3e-6 everywhere.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    const float small = fmaf(x * square, fmaf(square, 2.f / 15.f, -1.f / 3.f), x);
    const float large = fmaf(-2.f, ptx::reciprocal(ptx::exp2(x * (2.f * kLog2e)) + 1.f), 1.f);
    return fabsf(x) < 0.125f ? small : large;
  }
};

}  // namespace fa
