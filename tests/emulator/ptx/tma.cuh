// cuda/ptx/tma.cuh on the emulator. Shared memory is swizzled as TMA and wgmma do it: bits 4-6
// (128-byte rows), 4-5 (64-byte rows) or 4 (32-byte rows) of an address are XORed with as many bits
// from 7 on.
#pragma once

#include "ptx/mbarrier.cuh"

namespace fa::ptx {

inline bool elect_one() { return threadIdx.x % 32 == 0; }

inline void fence_proxy_async() {}

inline uint32_t swizzle(uint32_t address, int row_bytes) { return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4); }

// What tests/emulator/running.py writes in place of a CUtensorMap. The first dimension is
// contiguous; the others have strides in bytes.
struct FlatTensor {
  const char* data;
  int64_t strides[4];
  int32_t sizes[5], box[5], rank, element_bytes;
};
// Copies the box at `first` (five coordinates; those beyond the rank are 0).
inline void load_box(uint32_t dst, const TensorMap* map, uint32_t barrier, int rank, std::array<int, 5> first) {
  FlatTensor tensor;
  std::memcpy(&tensor, map->bytes, sizeof tensor);
  const int element = tensor.element_bytes, row_bytes = tensor.box[0] * element;
  if (dst % (8 * row_bytes) != 0) throw std::runtime_error("TMA: the target is not on a swizzle period");
  if (rank != tensor.rank) throw std::runtime_error("TMA: the tensor map has another rank");
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
      for (int c = 0; c < tensor.box[0]; c += 16 / element) {
        unsigned char* target = fa::shared + swizzle(dst + r * row_bytes + c * element, row_bytes);
        if (inside && first[0] + c < tensor.sizes[0]) {
          std::memcpy(target, source + (first[0] + c) * element, 16);
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
inline void tma_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int row, int head, int batch, uint64_t) {
  load_box(dst, map, barrier, 4, {col, row, head, batch, 0});
}
inline void tma_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int member, int row, int group, int batch,
                        uint64_t) {
  load_box(dst, map, barrier, 5, {col, member, row, group, batch});
}
inline void tma_prefetch_map(const TensorMap*) {}

}  // namespace fa::ptx
