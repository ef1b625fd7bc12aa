// SPDX-License-Identifier: Apache-2.0
// Merges two states of attention, each an output and an LSE over keys of its own (FlashAttention,
// arXiv 2205.14135, section 3.1). The result may go where one of them lies.
#pragma once

#include "attention/params.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

// `lanes` threads of a warp merge a row, 16 bytes of it at a time.
template <DType kDType, int kThreads, bool kAligned>
struct MergeStates {
  using Bits = fa::Bits<kDType>;  // of an element
  static constexpr int kElementBytes = sizeof(Bits), kChunk = 16 / kElementBytes;
  const MergeStatesParams& p;
  float first, second;  // weights
  bool none1, none2;    // which state has no keys

  __device__ __forceinline__ MergeStates(const MergeStatesParams& params, float lse1, float lse2)
      : p(params), none1(lse1 == negative_infinity()), none2(lse2 == negative_infinity()) {
    const float top = fmaxf(lse1, lse2);
    first = ptx::exp2((lse1 - top) * kLog2e);
    second = ptx::exp2((lse2 - top) * kLog2e);
    const float sum = first + second;
    first /= sum;
    second /= sum;
  }

  static __device__ __forceinline__ float merged_lse(float lse1, float lse2) {
    if (lse2 == negative_infinity()) return lse1;
    if (lse1 == negative_infinity()) return lse2;
    const float top = fmaxf(lse1, lse2);
    return top + ptx::log2(ptx::exp2((lse1 - top) * kLog2e) + ptx::exp2((lse2 - top) * kLog2e)) * kLn2;
  }

  // Offsets in elements to the row of o1, o2 and o.
  __device__ __forceinline__ void merge_row(int64_t at1, int64_t at2, int64_t at, int lane) const {
    for (int col = lane * kChunk; col < p.cols; col += p.lanes * kChunk) {
      if constexpr (kAligned) {
        const uint4 x = *reinterpret_cast<const uint4*>(address(p.o1, at1 + col)),
                    y = *reinterpret_cast<const uint4*>(address(p.o2, at2 + col));
        *reinterpret_cast<uint4*>(address(p.o, at + col)) = {merge(x.x, y.x), merge(x.y, y.y), merge(x.z, y.z), merge(x.w, y.w)};
      } else {
        for (int i = col; i < min(col + kChunk, p.cols); ++i) {
          const uint32_t x = *reinterpret_cast<const Bits*>(address(p.o1, at1 + i * p.o1_col));
          const uint32_t y = *reinterpret_cast<const Bits*>(address(p.o2, at2 + i * p.o2_col));
          *reinterpret_cast<Bits*>(address(p.o, at + i * p.o_col)) = static_cast<Bits>(merge(x, y));
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ const char* address(const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * kElementBytes;
  }
  static __device__ __forceinline__ char* address(void* base, int64_t element) {
    return static_cast<char*>(base) + element * kElementBytes;
  }

  // 32 bits: one number, or two of 16 bits.
  __device__ __forceinline__ uint32_t merge(uint32_t x, uint32_t y) const {
    if (none1 || none2) return none1 && none2 ? 0u : none2 ? x : y;
    if constexpr (kDType == DType::F32) {
      return static_cast<uint32_t>(__float_as_int(weigh(__int_as_float(static_cast<int>(x)), __int_as_float(static_cast<int>(y)))));
    } else {
      using Traits = MmaTraits<kDType>;
      return Traits::pack(weigh(Traits::widen(x), Traits::widen(y)), weigh(Traits::widen(x >> 16), Traits::widen(y >> 16)));
    }
  }
  // Rounds both products, so that the states may change places.
  __device__ __forceinline__ float weigh(float x, float y) const { return __fadd_rn(__fmul_rn(x, first), __fmul_rn(y, second)); }
};

template <DType kDType, int kThreads, bool kAligned>
__device__ __forceinline__ void merge_states(const MergeStatesParams& p) {
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / p.lanes, row = index < p.rows ? index : p.rows - 1;
  const int64_t token = row / p.heads, batch = token / p.seqlen, query = token - batch * p.seqlen, head = row - token * p.heads;
  const auto at = [&](const Strides& s) { return batch * s.batch + query * s.row + head * s.head; };
  const float lse1 = p.lse1[at(p.lse1_stride)], lse2 = p.lse2[at(p.lse2_stride)];
  __syncwarp();  // all lanes of the row have read what the result may replace
  if (index >= p.rows) return;
  using Merge = MergeStates<kDType, kThreads, kAligned>;
  Merge(p, lse1, lse2).merge_row(at(p.o1_stride), at(p.o2_stride), at(p.o_stride), lane);
  if (lane == 0) p.lse[at(p.lse_stride)] = Merge::merged_lse(lse1, lse2);
}

}  // namespace fa
