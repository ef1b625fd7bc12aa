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

inline uint32_t shared_element(uint32_t address, int row_bytes, int bytes) {
  uint32_t x = 0;
  std::memcpy(&x, fa::shared + swizzle(address, row_bytes), bytes);
  return x;
}

// The power of two below |x| that is nearest to it; 1 for 0.
inline float leading(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0x7f800000;
  std::memcpy(&x, &bits, 4);
  return x == 0.f ? 1.f : x;
}

// A step of 8-bit products, as an H200 does it (tests/fp8_accumulator.py): the 32 products of a column
// and its accumulator `D` are aligned to the largest of them; 13 bits below its leading one are kept,
// and the rest of each is dropped, as is what the sum then has beyond 14 bits.
inline void add_truncated(float (&D)[256], const float (&A)[32], const float (&B)[32][256], int n) {
  constexpr float kUnits = 1 << 13;
  static float products[32][256];
  float plain[256], largest[256], factor[256];
  int32_t units[256];
  for (int col = 0; col < n; ++col) plain[col] = D[col], largest[col] = std::fabs(D[col]);
  for (int k = 0; k < 32; ++k)
    for (int col = 0; col < n; ++col) {
      products[k][col] = A[k] * B[k][col];
      plain[col] += products[k][col];
      largest[col] = std::max(largest[col], std::fabs(products[k][col]));
    }
  for (int col = 0; col < n; ++col)
    if (!std::isfinite(plain[col]))
      for (int k = 0; k < 32; ++k) D[col] = products[k][col] = 0.f;
  for (int col = 0; col < n; ++col) {
    factor[col] = kUnits / leading(largest[col]);
    units[col] = static_cast<int32_t>(D[col] * factor[col]);
  }
  for (int k = 0; k < 32; ++k)
    for (int col = 0; col < n; ++col) units[col] += static_cast<int32_t>(products[k][col] * factor[col]);
  for (int col = 0; col < n; ++col) {
    const float sum = static_cast<float>(units[col]), step = std::max(1.f, leading(sum) / kUnits);
    D[col] = std::isfinite(plain[col]) ? static_cast<float>(static_cast<int32_t>(sum / step)) * step / factor[col] : plain[col];
  }
}

// Executes one product of a warpgroup; `all` holds the operands of its 128 threads.
inline void execute(emulator::Product* const* all) {
  const emulator::Product& first = *all[0];
  const int n = first.n, element = first.element_bytes, ks = 32 / element;
  static float A[64][32], B[32][256];
  auto fields = [](uint64_t descriptor, uint32_t& address, uint32_t& leading, uint32_t& stride) {
    address = (descriptor & 0x3FFF) << 4;
    leading = (descriptor >> 16 & 0x3FFF) << 4;
    stride = (descriptor >> 32 & 0x3FFF) << 4;
    return 256 >> (descriptor >> 62);  // bytes of a row
  };
  uint32_t address, leading, stride;
  int row_bytes = fields(first.b, address, leading, stride);
  for (int k = 0; k < ks; ++k) {
    for (int col = 0; col < n; ++col) {
      const int panel_cols = row_bytes / 2;
      const uint32_t at = first.b_transposed ? col / panel_cols * leading + k / 8 * stride + k % 8 * row_bytes + col % panel_cols * 2
                                             : col / 8 * stride + col % 8 * row_bytes + k * element;
      B[k][col] = first.widen_b(shared_element(address + at, row_bytes, element));
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < ks; ++k) {
      if (first.a_registers == nullptr) {
        uint32_t base, unused, step;
        const int bytes = fields(all[row / 16 * 32]->a, base, unused, step);
        A[row][k] = first.widen_a(shared_element(base + row / 8 * step + row % 8 * bytes + k * element, bytes, element));
      } else {
        const int byte = k * element;  // of the 32 of a row
        const uint32_t word = all[row / 16 * 32 + row % 8 * 4 + byte % 16 / 4]->a_registers[row % 16 / 8 + byte / 16 * 2];
        A[row][k] = first.widen_a((word >> byte % 4 * 8) & (element == 1 ? 0xff : 0xffff));
      }
    }
  }
  for (int row = 0; row < 64; ++row) {
    auto accumulator = [&](int col) -> float& {
      return all[row / 16 * 32 + row % 8 * 4 + col % 8 / 2]->d[col / 8 * 4 + row % 16 / 8 * 2 + col % 2];
    };
    float D[256] = {};
    if (element == 1) {
      for (int col = 0; col < n; ++col) D[col] = first.accumulate ? accumulator(col) : 0.f;
      add_truncated(D, A[row], B, n);
      for (int col = 0; col < n; ++col) accumulator(col) = D[col];
      continue;
    }
    for (int k = 0; k < ks; ++k)
      for (int col = 0; col < n; ++col) D[col] += A[row][k] * B[k][col];
    for (int col = 0; col < n; ++col) accumulator(col) = (first.accumulate ? accumulator(col) : 0.f) + D[col];
  }
}

// Executes the oldest group of a warpgroup, if all 128 threads have committed it.
inline bool execute_oldest(unsigned first) {
  emulator::Thread* const threads = &emulator::machine->threads[first];
  for (int t = 0; t < 128; ++t)
    if (threads[t].product_groups.empty()) return false;
  for (size_t i = 0; i < threads[0].product_groups.front().size(); ++i) {
    emulator::Product* all[128];
    for (int t = 0; t < 128; ++t) all[t] = &threads[t].product_groups.front().at(i);
    execute(all);
  }
  for (int t = 0; t < 128; ++t) threads[t].product_groups.erase(threads[t].product_groups.begin());
  return true;
}

// A wait is no barrier: a thread goes on as soon as the others have committed what it waits for.
inline void wgmma_commit() {
  emulator::Machine& m = *emulator::machine;
  const unsigned first = m.current / 128 * 128;
  emulator::Thread& self = m.threads[m.current];
  self.product_groups.push_back(std::move(self.open_products));
  self.open_products.clear();
  while (!m.late_copies && execute_oldest(first)) {
  }
  emulator::wake(m.warpgroups[first]);
}
template <int kPending>
void wgmma_wait() {
  emulator::Machine& m = *emulator::machine;
  const unsigned first = m.current / 128 * 128;
  while (m.threads[m.current].product_groups.size() > kPending) {
    if (execute_oldest(first)) continue;
    m.warpgroups[first].push_back(m.current);
    emulator::pause();
  }
}
template <int kTiles>
void warpgroup_fence_operand(float (&)[kTiles][4]) {}

template <int kN, DType kA, DType kB>
struct Wgmma {
  static constexpr int kBytes = bytes_of(kA);
  static_assert(kA == kB || (kBytes == 1 && bytes_of(kB) == 1));
  template <DType kDType>
  static float widen(uint32_t bits) {
    return kDType == DType::F16      ? widen_f16(bits)
           : kDType == DType::BF16   ? widen_bf16(bits)
           : kDType == DType::F8E4M3 ? widen_e4m3(bits)
                                     : widen_e5m2(bits);
  }
  static void ss(float (&d)[kN / 8][4], uint64_t a, uint64_t b, int accumulate) {
    push({&d[0][0], nullptr, a, b, accumulate != 0, false, kN, kBytes, widen<kA>, widen<kB>});
  }
  template <bool kAccumulate = true>
  static void rs(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b) {
    push({&d[0][0], a, 0, b, kAccumulate, kBytes == 2, kN, kBytes, widen<kA>, widen<kB>});
  }

 private:
  static void push(emulator::Product product) { emulator::machine->threads[emulator::machine->current].open_products.push_back(product); }
};

}  // namespace fa::ptx
