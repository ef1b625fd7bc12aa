// cuda/ptx/fp8.cuh on the emulator, with the same signatures.
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

// One number of kMantissa bits behind its sign and exponent, in float32.
template <int kMantissa>
inline float widen_narrow(uint32_t bits) {
  constexpr int kExponent = 7 - kMantissa, kBias = (1 << (kExponent - 1)) - 1;
  const int exponent = bits >> kMantissa & ((1 << kExponent) - 1), mantissa = bits & ((1 << kMantissa) - 1);
  const float sign = bits & 0x80 ? -1.f : 1.f;
  if (kMantissa == 3 && (bits & 0x7f) == 0x7f) return NAN;
  if (kMantissa == 2 && exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ::ldexpf(static_cast<float>(mantissa), 1 - kBias - kMantissa);
  return sign * ::ldexpf(static_cast<float>(mantissa + (1 << kMantissa)), exponent - kBias - kMantissa);
}
// The nearest of all finite numbers, of two the even one.
template <int kMantissa>
inline uint32_t round_narrow(float x) {
  if (x != x) return 0x7f;
  constexpr uint32_t kLargest = kMantissa == 3 ? 0x7e : 0x7b;
  const float magnitude = ::fabsf(x);
  uint32_t best = 0;
  for (uint32_t bits = 1; bits <= kLargest; ++bits) {
    const float gain = ::fabsf(widen_narrow<kMantissa>(best) - magnitude) - ::fabsf(widen_narrow<kMantissa>(bits) - magnitude);
    if (gain > 0 || (gain == 0 && bits % 2 == 0)) best = bits;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

template <int kMantissa, bool kHigh>
inline uint32_t f16_of_narrow(uint32_t word) {
  const uint32_t pair = kHigh ? word >> 16 : word;
  return pack_f16(widen_narrow<kMantissa>(pair & 0xff), widen_narrow<kMantissa>(pair >> 8 & 0xff));
}
template <bool kHigh>
inline uint32_t f16_of_e4m3(uint32_t word) {
  return f16_of_narrow<3, kHigh>(word);
}
template <bool kHigh>
inline uint32_t f16_of_e5m2(uint32_t word) {
  return f16_of_narrow<2, kHigh>(word);
}
inline uint32_t pack_e4m3(float lo, float hi) { return round_narrow<3>(lo) | round_narrow<3>(hi) << 8; }
inline uint32_t pack_e5m2(float lo, float hi) { return round_narrow<2>(lo) | round_narrow<2>(hi) << 8; }

template <uint32_t kSelector>
inline uint32_t pick_bytes(uint32_t x, uint32_t y) {
  const uint64_t both = x | static_cast<uint64_t>(y) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> (8 * (kSelector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}

}  // namespace fa::ptx
