// cuda/ptx/mbarrier.cuh on the emulator.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline void mbarrier_init(uint32_t barrier, int count) { emulator::machine->mbarriers[barrier] = {count, count, 0, 0, {}}; }
inline emulator::Barrier& barrier_at(uint32_t barrier) {
  const auto found = emulator::machine->mbarriers.find(barrier);
  if (found == emulator::machine->mbarriers.end()) throw std::runtime_error("mbarrier: used before it was initialised");
  return found->second;
}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  emulator::Barrier& b = barrier_at(barrier);
  if (b.pending == 0) throw std::runtime_error("mbarrier: more arrivals than it counts");
  b.bytes += bytes;
  --b.pending;
  emulator::end_phase_if_complete(b);
}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_wait(uint32_t barrier, int parity) {
  emulator::Barrier& b = barrier_at(barrier);
  while (b.phase % 2 == parity) {
    b.waiting.push_back(emulator::machine->current);
    emulator::pause();
  }
}
inline void mbarrier_init_fence() {}

}  // namespace fa::ptx
