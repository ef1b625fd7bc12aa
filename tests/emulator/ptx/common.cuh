// cuda/ptx/common.cuh on the emulator, with the same signatures.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline uint32_t shared_address(const void* p) { return static_cast<const unsigned char*>(p) - fa::shared; }

inline void store_shared_16(uint32_t dst, uint4 x) { std::memcpy(fa::shared + dst, &x, 16); }

inline void store_shared_4(uint32_t dst, uint32_t x) { std::memcpy(fa::shared + dst, &x, 4); }

inline uint32_t load_shared_4(uint32_t src) {
  uint32_t x;
  std::memcpy(&x, fa::shared + src, 4);
  return x;
}

inline uint4 load_shared_16(uint32_t src) {
  uint4 x;
  std::memcpy(&x, fa::shared + src, 16);
  return x;
}

inline void store_shared_8(uint32_t dst, float x, float y) {
  std::memcpy(fa::shared + dst, &x, 4);
  std::memcpy(fa::shared + dst + 4, &y, 4);
}
inline void load_shared_8(float& x, float& y, uint32_t src) {
  std::memcpy(&x, fa::shared + src, 4);
  std::memcpy(&y, fa::shared + src + 4, 4);
}
inline float4 load_shared_16_floats(uint32_t src) {
  float4 x;
  std::memcpy(&x, fa::shared + src, 16);
  return x;
}

inline float widen_f16(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  _Float16 x;
  std::memcpy(&x, &half, 2);
  return static_cast<float>(x);
}
inline float widen_bf16(uint32_t bits) { return __int_as_float(static_cast<int>(bits << 16)); }

inline uint32_t round_f16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_f16(float lo, float hi) { return round_f16(lo) | round_f16(hi) << 16; }
inline uint32_t pack_bf16(float lo, float hi) { return round_bf16(lo) | round_bf16(hi) << 16; }

// 8-bit floats (OCP OFP8): e4m3 has no infinity, and NaN where both have all bits set.
struct Fp8Format {
  int mantissa, bias;
  float largest;
};
inline constexpr Fp8Format kE4m3 = {3, 7, 448.f}, kE5m2 = {2, 15, 57344.f};

inline float widen_fp8(uint32_t bits, Fp8Format format) {
  const int exponent = bits >> format.mantissa & (0x7f >> format.mantissa), fraction = bits & ((1 << format.mantissa) - 1);
  const float sign = bits & 0x80 ? -1.f : 1.f;
  if (format.mantissa == 3 ? (bits & 0x7f) == 0x7f : exponent == 31 && fraction != 0) return NAN;
  if (format.mantissa == 2 && exponent == 31) return sign * INFINITY;
  const float scaled = exponent == 0 ? fraction : fraction + (1 << format.mantissa);
  return sign * std::ldexp(scaled, std::max(exponent, 1) - format.bias - format.mantissa);
}
inline float widen_e4m3(uint32_t bits) { return widen_fp8(bits & 0xff, kE4m3); }
inline float widen_e5m2(uint32_t bits) { return widen_fp8(bits & 0xff, kE5m2); }

// Round to nearest even; what is too large becomes the largest number.
inline uint32_t round_fp8(float x, Fp8Format format) {
  if (x != x) return 0x7f;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::min(std::fabs(x), format.largest);
  if (magnitude == 0.f) return sign;  // frexp gives it the exponent of 1/2
  int exponent;
  std::frexp(magnitude, &exponent);
  const int step = std::max(exponent - 1, 1 - format.bias) - format.mantissa;  // of the last bit
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -step)));
  // A carry out of the fraction is one into the exponent.
  return sign | static_cast<uint32_t>(units + ((step + format.mantissa + format.bias - 1) << format.mantissa));
}
inline uint32_t pack_e4m3(float lo, float hi) { return round_fp8(lo, kE4m3) | round_fp8(hi, kE4m3) << 8; }
inline uint32_t pack_e5m2(float lo, float hi) { return round_fp8(lo, kE5m2) | round_fp8(hi, kE5m2) << 8; }

inline float exp2(float x) { return ::exp2f(x); }
inline float log2(float x) { return ::log2f(x); }
inline float reciprocal(float x) { return 1.f / x; }

inline void optimisation_barrier(int&) {}

}  // namespace fa::ptx
