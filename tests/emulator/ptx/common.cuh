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

inline float exp2(float x) { return ::exp2f(x); }
inline float log2(float x) { return ::log2f(x); }
inline float reciprocal(float x) { return 1.f / x; }

inline void optimisation_barrier(int&) {}

}  // namespace fa::ptx
