// The score policy: from the raw product q.k to the number whose exp2 is taken.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/common.cuh"

namespace fa {

constexpr float kLog2e = 1.4426950408889634f;

// Plain scores stay raw and softmax_scale * log2(e) is folded into the exponent's FMA; it must be positive for that, since the maximum is
// taken of the raw scores. softcap, and `prescale` for scales that are not or hardly positive, bring scores to log2 units first, and the
// factor left is 1.
template <Config C>
struct Score {
  static constexpr bool kInLog2 = C.softcap || C.prescale;
  // Two special functions an element, which is what tanh takes, cost more than both products of narrow heads. Where raw scores are small beside
  // the cap, a polynomial inside the exponent does: series().
  static constexpr bool kHasSeries = C.softcap && !C.alibi && !C.prescale;
  float factor;  // from what apply() leaves to log2 units
  float scale, cap_scale, cap;
  float cubic, quintic;  // coefficients of series()
  float slope;           // per key of distance, in the units of apply()

  __device__ __forceinline__ Score(const FwdParams& p, int batch, int head)
      : factor(kInLog2 ? 1.f : p.scale_log2),
        scale(p.scale_log2),
        cap_scale(p.softcap_scale),
        cap(p.softcap_log2),
        cubic(p.softcap_cubic),
        quintic(p.softcap_quintic),
        slope(0.f) {
    if constexpr (C.alibi) {
      slope = p.alibi_slopes[batch * p.alibi_batch_stride + head] * kLog2e;
      if constexpr (!kInLog2) slope /= p.scale_log2;
    }
  }

  // `distance` is j - p.
  __device__ __forceinline__ float apply(float s, float distance) const {
    if constexpr (C.softcap) {
      s = cap * tanh(s * cap_scale);
    } else if constexpr (C.prescale) {
      s *= scale;
    }
    if constexpr (C.alibi) s = fmaf(-slope, fabsf(distance), s);
    return s;
  }

  // A capped score less `reference`, for |s| up to softcap_limit.
  __device__ __forceinline__ float series(float s, float reference) const {
    const float square = s * s;
    return fmaf(s, fmaf(square, fmaf(square, quintic, cubic), scale), -reference);
  }

 private:
  // 1 - 2 / (e^2x + 1): absolute error about 1e-7, where tanh.approx has 5e-4 and would show in f16. A cap far above the scores multiplies
  // that error, so small arguments take the Taylor series: relative error below 3e-6 everywhere.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    const float small = fmaf(x * square, fmaf(square, 2.f / 15.f, -1.f / 3.f), x);
    const float large = fmaf(-2.f, ptx::reciprocal(ptx::exp2(x * (2.f * kLog2e)) + 1.f), 1.f);
    return fabsf(x) < 0.125f ? small : large;
  }
};

}  // namespace fa
