// cuda/ptx/turn.cuh on the emulator, which runs one block after the other: a block never waits.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline void wait_for(const int32_t* address, int32_t x) {
  if (*address != x) throw std::runtime_error("turn: a block waits for one that has not begun");
}
inline void store_release(int32_t* address, int32_t x) { *address = x; }

}  // namespace fa::ptx
