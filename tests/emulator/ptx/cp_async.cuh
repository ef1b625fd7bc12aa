// cuda/ptx/cp_async.cuh on the emulator.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline void cp_async_16(uint32_t dst, const void* src) { emulator::start_copy(dst, src); }
inline void cp_async_16_or_zero(uint32_t dst, const void* src, bool valid) { emulator::start_copy(dst, valid ? src : nullptr); }
inline void cp_async_8(uint32_t dst, const void* src) { emulator::start_copy(dst, src, 8); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}

}  // namespace fa::ptx
