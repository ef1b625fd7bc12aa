// cuda/ptx/local.cuh on the emulator.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline uint64_t local_address(const void* p) { return reinterpret_cast<uint64_t>(p); }
inline void store_local_16(uint64_t dst, const float (&x)[4]) { std::memcpy(reinterpret_cast<void*>(dst), x, 16); }
inline void load_local_16(float (&x)[4], uint64_t src) { std::memcpy(x, reinterpret_cast<const void*>(src), 16); }

}  // namespace fa::ptx
