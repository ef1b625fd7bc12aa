// SPDX-License-Identifier: Apache-2.0
// Types that leaves and parameters share.
#pragma once

namespace fa {

// Fixed-width integers: NVRTC has no <cstdint>, and libcu++'s costs a tenth of a second a kernel.
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

enum class DType { F16, BF16, F32, F8E4M3, F8E5M2 };

constexpr int bytes_of(DType t) { return t == DType::F32 ? 4 : t == DType::F16 || t == DType::BF16 ? 2 : 1; }

// An unsigned integer as wide as an element.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using Type = uint8_t;
};
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};
template <>
struct BitsOf<4> {
  using Type = uint32_t;
};
template <DType kDType>
using Bits = typename BitsOf<bytes_of(kDType)>::Type;

// CUtensorMap, encoded on the host by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace fa
