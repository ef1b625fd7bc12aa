// Fixed-width integers: NVRTC has no <cstdint>, and libcu++'s costs a tenth of a second a kernel.
#pragma once

namespace fa {

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

}  // namespace fa
