// cuda/ptx/named_barrier.cuh on the emulator.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

inline void named_barrier_sync(int id, int threads) {
  emulator::NamedBarrier& barrier = emulator::machine->named_barriers[id];
  barrier.waiting.push_back(emulator::machine->current);
  emulator::come(barrier, threads);
  emulator::pause();
}
inline void named_barrier_arrive(int id, int threads) { emulator::come(emulator::machine->named_barriers[id], threads); }

}  // namespace fa::ptx
