// The leaves of cuda/hopper_ptx.cuh, with the same signatures, on the emulator. Shared memory is swizzled as tensor copies and wgmma do it: bits
// 4-6 (128-byte rows) or 4-5 (64-byte rows) of an address are XORed with bits 7-9 or 7-8.
#pragma once

#include "config.cuh"
#include "params.cuh"
#include "ptx.cuh"

namespace fa::ptx {

inline void barrier_init(uint32_t barrier, int count) { emulator::machine->mbarriers[barrier] = {count, count, 0, 0, {}}; }
inline emulator::Barrier& barrier_at(uint32_t barrier) {
  const auto found = emulator::machine->mbarriers.find(barrier);
  if (found == emulator::machine->mbarriers.end()) throw std::runtime_error("mbarrier: used before it was initialised");
  return found->second;
}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::Barrier& b = barrier_at(barrier);
  if (b.pending == 0) throw std::runtime_error("mbarrier: more arrivals than it counts");
  b.bytes += bytes;
  --b.pending;
  emulator::end_phase_if_complete(b);
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }
inline void barrier_wait(uint32_t barrier, int parity) {
  emulator::Barrier& b = barrier_at(barrier);
  while (b.phase % 2 == parity) {
    b.waiting.push_back(emulator::machine->current);
    emulator::pause();
  }
}
inline void barrier_init_fence() {}
inline void async_proxy_fence() {}

inline uint32_t swizzle(uint32_t address, int row_bytes) { return address ^ ((address >> 7 & (row_bytes == 128 ? 7 : 3)) << 4); }

// What tests/emulator/running.py writes in place of a CUtensorMap. The first dimension is contiguous; the others have strides in bytes.
struct FlatTensor {
  const char* data;
  int64_t strides[4];
  int32_t sizes[5], box[5], rank;
};
// Copies the box at `first` (five coordinates; those beyond the rank are 0).
inline void load_box(uint32_t dst, const TensorMap* map, uint32_t barrier, int rank, std::array<int, 5> first) {
  FlatTensor tensor;
  std::memcpy(&tensor, map->bytes, sizeof tensor);
  const int row_bytes = tensor.box[0] * 2;
  if (dst % (8 * row_bytes) != 0) throw std::runtime_error("tensor copy: the target is not on a swizzle period");
  if (rank != tensor.rank) throw std::runtime_error("tensor copy: the tensor map has another rank");
  emulator::machine->engine.push_back([=] {
    const int rows = tensor.box[1] * tensor.box[2] * tensor.box[3] * tensor.box[4];
    for (int r = 0; r < rows; ++r) {
      const char* source = tensor.data;
      bool inside = true;
      for (int d = 1, rest = r; d < 5; rest /= tensor.box[d], ++d) {
        const int at = first[d] + rest % tensor.box[d];
        inside &= at >= 0 && at < tensor.sizes[d];
        source += at * tensor.strides[d - 1];
      }
      for (int c = 0; c < tensor.box[0]; c += 8) {
        unsigned char* target = fa::shared + swizzle(dst + r * row_bytes + c * 2, row_bytes);
        if (inside && first[0] + c < tensor.sizes[0]) {
          std::memcpy(target, source + (first[0] + c) * 2, 16);
        } else {
          std::memset(target, 0, 16);
        }
      }
    }
    emulator::Barrier& b = barrier_at(barrier);
    b.bytes -= rows * row_bytes;
    emulator::end_phase_if_complete(b);
  });
}
inline void tensor_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int row, int head, int batch, uint64_t) {
  load_box(dst, map, barrier, 4, {col, row, head, batch, 0});
}
inline void tensor_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int member, int row, int group, int batch, uint64_t) {
  load_box(dst, map, barrier, 5, {col, member, row, group, batch});
}
inline void tensor_prefetch(const TensorMap*) {}

inline void named_barrier_sync(int id, int threads) {
  emulator::NamedBarrier& barrier = emulator::machine->named_barriers[id];
  barrier.waiting.push_back(emulator::machine->current);
  emulator::come(barrier, threads);
  emulator::pause();
}
inline void named_barrier_arrive(int id, int threads) { emulator::come(emulator::machine->named_barriers[id], threads); }

template <int kRegisters>
void registers_release() {}
template <int kRegisters>
void registers_acquire() {}
inline bool elect_one() { return threadIdx.x % 32 == 0; }

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
inline void conceal(int&) {}
template <int kTiles>
void pin(float (&)[kTiles][4]) {}

template <int kN, DType kDType>
struct Wgmma {
  static float widen(uint32_t bits) { return kDType == DType::F16 ? widen_f16(bits) : widen_bf16(bits); }
  static void keys(float (&d)[kN / 8][4], uint64_t a, uint64_t b, int accumulate) {
    push({&d[0][0], nullptr, a, b, accumulate != 0, false, kN, widen});
  }
  static void values(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b) { push({&d[0][0], a, 0, b, true, true, kN, widen}); }

 private:
  static void push(emulator::Product product) { emulator::machine->threads[emulator::machine->current].open_products.push_back(product); }
};

}  // namespace fa::ptx
