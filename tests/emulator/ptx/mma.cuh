// cuda/ptx/mma.cuh on the emulator. Fragment layouts are those of the PTX ISA, "Matrix fragments
// for mma.m16n8k16".
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
template <class Widen>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen) {
  ProductOperands mine = {d, a, {b0, b1}};
  emulator::warp_wide(mine, [widen](ProductOperands** all) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const int row = group + i % 2 * 8, col = pair + i / 2 * 8;
        A[row][col] = widen(all[lane]->a[i] & 0xffff);
        A[row][col + 1] = widen(all[lane]->a[i] >> 16);
      }
      for (int i = 0; i < 2; ++i) {
        B[pair + 8 * i][group] = widen(all[lane]->b[i] & 0xffff);
        B[pair + 8 * i + 1][group] = widen(all[lane]->b[i] >> 16);
      }
    }
    float D[16][8] = {};
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int col = 0; col < 8; ++col) D[row][col] += A[row][k] * B[k][col];
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) all[lane]->d[e] += D[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(d, a, b0, b1, widen_f16); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(d, a, b0, b1, widen_bf16); }

}  // namespace fa::ptx
