// cuda/ptx/turn.cuh on the emulator, which runs one block after the other: the first load finds what
// a block waits for, or none does.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline int32_t load_acquire(const int32_t* address) { return *address; }
inline void store_release(int32_t* address, int32_t x) { *address = x; }

}  // namespace fa::ptx
