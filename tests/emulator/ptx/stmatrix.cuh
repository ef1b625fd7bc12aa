// cuda/ptx/stmatrix.cuh on the emulator.
#pragma once

#include "ptx/mma.cuh"

namespace fa::ptx {

inline void stmatrix_x4(uint32_t dst, const uint32_t (&r)[4]) {
  struct Operands {
    const uint32_t* r;
    uint32_t dst;
  } mine = {r, dst};
  emulator::warp_wide(mine, [](Operands** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) std::memcpy(fa::shared + all[8 * m + lane / 4]->dst + lane % 4 * 4, &all[lane]->r[m], 4);
  });
}

}  // namespace fa::ptx
