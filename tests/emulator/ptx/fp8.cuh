// cuda/ptx/fp8.cuh on the emulator, with the same signatures.
#pragma once

#include "ptx/common.cuh"
#include "ptx/mma.cuh"

namespace fa::ptx {

template <bool kHigh, class Widen>
uint32_t f16_of_pair(uint32_t word, Widen widen) {
  const uint32_t pair = kHigh ? word >> 16 : word;
  return pack_f16(widen(pair & 0xff), widen(pair >> 8 & 0xff));
}
template <bool kHigh>
uint32_t f16_of_e4m3(uint32_t word) {
  return f16_of_pair<kHigh>(word, widen_e4m3);
}
template <bool kHigh>
uint32_t f16_of_e5m2(uint32_t word) {
  return f16_of_pair<kHigh>(word, widen_e5m2);
}

template <uint32_t kSelector>
uint32_t pick_bytes(uint32_t x, uint32_t y) {
  const uint64_t both = x | static_cast<uint64_t>(y) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> (8 * (kSelector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}

inline void mma_e4m3_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(d, a, b0, b1, widen_e4m3, widen_e4m3);
}
inline void mma_e4m3_e5m2(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(d, a, b0, b1, widen_e4m3, widen_e5m2);
}
inline void mma_e5m2_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(d, a, b0, b1, widen_e5m2, widen_e4m3);
}
inline void mma_e5m2_e5m2(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(d, a, b0, b1, widen_e5m2, widen_e5m2);
}

}  // namespace fa::ptx
