// cuda/ptx/mma.cuh on the emulator. Fragment layouts are those of the PTX ISA, "Matrix fragments
// for mma.m16n8k16" and "for mma.m16n8k32".
#pragma once

#include "ptx/common.cuh"

namespace fa::ptx {

struct MatrixOperands {
  uint32_t* r;
  uint32_t src;
};
// Lane l gives the address of row l % 8 of matrix l / 8; lane l gets elements 2 * (l % 4) and + 1
// of row l / 4 of each matrix, or, transposed, of column l / 4.
inline void load_matrices(uint32_t (&r)[4], uint32_t src, bool transposed) {
  MatrixOperands mine = {r, src};
  emulator::warp_wide(mine, [transposed](MatrixOperands** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int row = transposed ? lane % 4 * 2 + e : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + e;
          std::memcpy(&pair[e], fa::shared + all[8 * m + row]->src + 2 * col, 2);
        }
        all[lane]->r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t src) { load_matrices(r, src, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t src) { load_matrices(r, src, true); }

struct ProductOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// Operands of kBits bits: a word holds kOfWord of them, neighbours along k.
template <int kBits, class WidenA, class WidenB>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, WidenA widen_a, WidenB widen_b) {
  ProductOperands mine = {d, a, {b0, b1}};
  emulator::warp_wide(mine, [widen_a, widen_b](ProductOperands** all) {
    constexpr int kOfWord = 32 / kBits, kStep = 8 * kOfWord;
    constexpr uint32_t kMask = (1u << kBits) - 1;
    float A[16][kStep], B[kStep][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, first = lane % 4 * kOfWord;
      for (int n = 0; n < kOfWord; ++n) {
        for (int i = 0; i < 4; ++i)
          A[group + i % 2 * 8][first + n + i / 2 * 4 * kOfWord] = widen_a(all[lane]->a[i] >> (n * kBits) & kMask);
        for (int i = 0; i < 2; ++i) B[first + n + i * 4 * kOfWord][group] = widen_b(all[lane]->b[i] >> (n * kBits) & kMask);
      }
    }
    float D[16][8] = {};
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kStep; ++k)
        for (int col = 0; col < 8; ++col) D[row][col] += A[row][k] * B[k][col];
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) all[lane]->d[e] += D[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply<16>(d, a, b0, b1, widen_f16, widen_f16); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<16>(d, a, b0, b1, widen_bf16, widen_bf16);
}

}  // namespace fa::ptx
