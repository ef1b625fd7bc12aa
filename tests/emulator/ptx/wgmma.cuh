// cuda/ptx/wgmma.cuh on the emulator.
#pragma once

#include "ptx/common.cuh"
#include "ptx/tma.cuh"

namespace fa::ptx {

template <int kRegisters>
void setmaxnreg_dec() {}
template <int kRegisters>
void setmaxnreg_inc() {}
inline void wgmma_fence() {}

inline uint16_t shared_half(uint32_t address, int row_bytes) {
  uint16_t x;
  std::memcpy(&x, fa::shared + swizzle(address, row_bytes), 2);
  return x;
}

// Executes one product of a warpgroup; `all` holds the operands of its 128 threads.
inline void execute(emulator::Product* const* all) {
  const emulator::Product& first = *all[0];
  const int n = first.n;
  static float A[64][16], B[16][256];
  auto fields = [](uint64_t descriptor, uint32_t& address, uint32_t& leading, uint32_t& stride) {
    address = (descriptor & 0x3FFF) << 4;
    leading = (descriptor >> 16 & 0x3FFF) << 4;
    stride = (descriptor >> 32 & 0x3FFF) << 4;
    return descriptor >> 62 == 1 ? 128 : 64;  // bytes of a row
  };
  uint32_t address, leading, stride;
  int row_bytes = fields(first.b, address, leading, stride);
  for (int k = 0; k < 16; ++k) {
    for (int col = 0; col < n; ++col) {
      const int panel_cols = row_bytes / 2;
      const uint32_t at = first.b_transposed ? col / panel_cols * leading + k / 8 * stride + k % 8 * row_bytes + col % panel_cols * 2
                                             : col / 8 * stride + col % 8 * row_bytes + k * 2;
      B[k][col] = first.widen(shared_half(address + at, row_bytes));
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (first.a_registers == nullptr) {
        uint32_t base, unused, step;
        const int bytes = fields(all[row / 16 * 32]->a, base, unused, step);
        A[row][k] = first.widen(shared_half(base + row / 8 * step + row % 8 * bytes + k * 2, bytes));
      } else {
        const uint32_t word = all[row / 16 * 32 + row % 8 * 4 + k % 8 / 2]->a_registers[row % 16 / 8 + k / 8 * 2];
        A[row][k] = first.widen(k % 2 ? word >> 16 : word & 0xffff);
      }
    }
  }
  for (int row = 0; row < 64; ++row) {
    float D[256] = {};
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < n; ++col) D[col] += A[row][k] * B[k][col];
    for (int col = 0; col < n; ++col) {
      const emulator::Product& owner = *all[row / 16 * 32 + row % 8 * 4 + col % 8 / 2];
      float& d = owner.d[col / 8 * 4 + row % 16 / 8 * 2 + col % 2];
      d = (first.accumulate ? d : 0.f) + D[col];
    }
  }
}

// All 128 threads come together, then everything but the newest `pending` groups is executed.
inline void finish_products(size_t pending) {
  emulator::Machine& m = *emulator::machine;
  const unsigned first = m.current / 128 * 128;
  emulator::gather(m.warpgroups[first], 128, [&m, first, pending] {
    while (m.threads[first].product_groups.size() > pending) {
      for (size_t i = 0; i < m.threads[first].product_groups.front().size(); ++i) {
        emulator::Product* all[128];
        for (int t = 0; t < 128; ++t) all[t] = &m.threads[first + t].product_groups.front().at(i);
        execute(all);
      }
      for (int t = 0; t < 128; ++t) m.threads[first + t].product_groups.erase(m.threads[first + t].product_groups.begin());
    }
  });
}
inline void wgmma_commit() {
  emulator::Thread& self = emulator::machine->threads[emulator::machine->current];
  self.product_groups.push_back(std::move(self.open_products));
  self.open_products.clear();
  if (!emulator::machine->late_copies) finish_products(0);
}
template <int kPending>
void wgmma_wait() {
  finish_products(kPending);
}
template <int kTiles>
void warpgroup_fence_operand(float (&)[kTiles][4]) {}

template <int kN, DType kA, DType kB>
struct Wgmma {
  static_assert(kA == kB);
  static float widen(uint32_t bits) { return kA == DType::F16 ? widen_f16(bits) : widen_bf16(bits); }
  static void ss(float (&d)[kN / 8][4], uint64_t a, uint64_t b, int accumulate) {
    push({&d[0][0], nullptr, a, b, accumulate != 0, false, kN, widen});
  }
  static void rs(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b) { push({&d[0][0], a, 0, b, true, true, kN, widen}); }

 private:
  static void push(emulator::Product product) { emulator::machine->threads[emulator::machine->current].open_products.push_back(product); }
};

}  // namespace fa::ptx
