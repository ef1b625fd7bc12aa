// cuda/ptx/turn.cuh on the emulator. It runs one block after the other: a number that is not there
// at once will never be.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline int32_t load_acquire(const int32_t* address) {
  static thread_local int unchanged = 0;
  static thread_local int32_t last = -1;
  unchanged = *address == last ? unchanged + 1 : 0;
  last = *address;
  if (unchanged > 1000) throw std::runtime_error("turn: a block waits for one that never ran");
  return last;
}
inline void store_release(int32_t* address, int32_t x) { *address = x; }
inline void raise_release(int32_t* address, int32_t x) { *address = std::max(*address, x); }

}  // namespace fa::ptx
