// SPDX-License-Identifier: Apache-2.0
// stmatrix, the inverse of ldmatrix, sm_90 (PTX ISA, "stmatrix").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t dst, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fa::ptx
