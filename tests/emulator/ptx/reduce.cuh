// cuda/ptx/reduce.cuh on the emulator.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline void add_global_fragment(float* block, const float (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(block) % 16 != 0) throw std::runtime_error("red: misaligned address");
  for (int i = 0; i < 4; ++i) block[4 * (threadIdx.x % 32) + i] += x[i];
}
inline void store_global_fragment(float* block, const float (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(block) % 16 != 0) throw std::runtime_error("st: misaligned address");
  for (int i = 0; i < 4; ++i) block[4 * (threadIdx.x % 32) + i] = x[i];
}
inline void load_global_fragment(float (&x)[4], const float* block) {
  for (int i = 0; i < 4; ++i) x[i] = block[4 * (threadIdx.x % 32) + i];
}

}  // namespace fa::ptx
