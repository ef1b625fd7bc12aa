// SPDX-License-Identifier: Apache-2.0
// PTX of every architecture: shared memory, conversion, special functions. One instruction a
// function (PTX ISA 9.0). Only the headers in ptx/ and kernels/wgmma.py write asm.
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// st.shared.v4: 16 bytes.
__device__ __forceinline__ void store_shared_16(uint32_t dst, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// st.shared: 4 bytes.
__device__ __forceinline__ void store_shared_4(uint32_t dst, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(dst), "r"(x) : "memory");
}

// ld.shared: 4 bytes that another thread wrote.
__device__ __forceinline__ uint32_t load_shared_4(uint32_t src) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(src) : "memory");
  return x;
}

// ld.shared.v4: 16 bytes that another warp wrote.
__device__ __forceinline__ uint4 load_shared_16(uint32_t src) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(src) : "memory");
  return x;
}

// st.shared.v2, ld.shared.v2, ld.shared.v4: two or four floats.
__device__ __forceinline__ void store_shared_8(uint32_t dst, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(dst), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void load_shared_8(float& x, float& y, uint32_t src) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(src) : "memory");
}

__device__ __forceinline__ float4 load_shared_16_floats(uint32_t src) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(src) : "memory");
  return x;
}

// cvt.rn: two float32 to one packed pair, round to nearest even; `lo` goes to the low half.
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// cvt.rn.satfinite, sm_89: two float32 to a pair of 8-bit floats, `lo` in the low byte.
__device__ __forceinline__ uint32_t pack_e4m3(float lo, float hi) {
  unsigned short r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ uint32_t pack_e5m2(float lo, float hi) {
  unsigned short r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
  return r;
}

// cvt: one 16-bit number, in the low half, to float32. That of bf16 is a shift.
__device__ __forceinline__ float widen_f16(uint32_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(static_cast<unsigned short>(bits)));
  return y;
}
__device__ __forceinline__ float widen_bf16(uint32_t bits) { return __int_as_float(static_cast<int>(bits << 16)); }

// ex2, lg2, rcp: approximate, relative error up to 2^-22 (lg2 near 1: absolute); 16 a clock and SM.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Optimisation barrier: makes x opaque to the compiler. No instruction.
__device__ __forceinline__ void optimisation_barrier(int& x) { asm volatile("" : "+r"(x)); }

}  // namespace fa::ptx
