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

enum class DType { F16, BF16, F32 };

// CUtensorMap, encoded on the host by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace fa
