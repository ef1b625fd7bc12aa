// SPDX-License-Identifier: Apache-2.0
// How the kernel over a cache holds Q, K and V in shared memory and multiplies them, as their types
// ask for it.
#pragma once

#include "attention/score_tile.cuh"
#include "tile/fp8_traits.cuh"
#include "tile/fragment.cuh"
#include "tile/loader.cuh"

namespace fa {

// One type of 16 bits.
template <Config C, bool kFp8 = bytes_of(C.k_dtype) == 1>
struct CacheOperands {
  static constexpr bool kConverts = false;
  static constexpr DType kP = C.dtype;
  static constexpr bool kPairsColumns = false;
  static constexpr int kLaneCols = 1;
  static constexpr int kElementBytes = 2;
  using Traits = MmaTraits<C.dtype>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  using ReadQ = FragmentReader<C.block_m, C.head_dim>;
  using ReadK = FragmentReader<C.block_n, C.head_dim>;
  using ReadV = FragmentReader<C.block_n, C.v_head_dim>;
  static constexpr int kCopiesOfQ = TileQ::kChunks;  // of a row

  // 16 bytes of Q, `copy` of a row, from where it begins. Rows that do not exist are zeros.
  static __device__ __forceinline__ void load_q(uint32_t sQ, int r, int copy, const void* q, int64_t at, bool valid, int cols) {
    const uint16_t* from = static_cast<const uint16_t*>(q) + at + 8 * copy;
    if constexpr (C.aligned) {
      ptx::cp_async_16_or_zero(sQ + TileQ::offset(r, copy), from, valid && (C.exact_head_dim || 8 * copy < cols));
    } else {
      ptx::store_shared_16(sQ + TileQ::offset(r, copy), gather(from, valid ? cols - 8 * copy : 0));
    }
  }
};

// K and V in fp8 and Q in fp8 or 16 bits: products are those of the 16-bit type of Q, or of f16. K
// and V are widened on the way from shared memory to the products, Q on the way there.
//
// ldmatrix gives a lane four neighbouring bytes where it gives two elements of 16 bits. Nothing is
// shuffled for that. Q K^T: a lane has columns 4c to 4c + 3 of 16 for 2c, 2c + 1, 2c + 8 and 2c + 9,
// and Q lies in shared memory in that order. P V: of the 16 columns of two accumulator tiles, one
// has the even ones, the other one the odd ones.
template <Config C>
struct CacheOperands<C, true> {
  static constexpr bool kConverts = true, kFp8Q = bytes_of(C.dtype) == 1;
  // P is rounded to fp8 before it is multiplied with descales of its keys, as they are factors of V.
  static constexpr bool kRoundsEarly = kFp8Q && (C.v_token_scales || C.batch_invariant);
  static constexpr DType kP = kFp8Q ? C.v_dtype : C.dtype;
  static constexpr bool kPairsColumns = true;
  static constexpr int kLaneCols = 2;
  static constexpr int kElementBytes = 1;
  static constexpr DType kProduct = kFp8Q ? DType::F16 : C.dtype;
  using Traits = MmaTraits<kProduct>;
  using Tile = ScoreTile<C, 1>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim / 2>;
  using TileV = SharedTile<C.block_n, C.v_head_dim / 2>;
  using ReadQ = FragmentReader<C.block_m, C.head_dim>;
  using ReadK = FragmentReader<C.block_n, C.head_dim / 2>;
  using ReadV = FragmentReader<C.block_n, C.v_head_dim / 2>;
  using WidenK = Fp8Traits<C.k_dtype, kProduct>;
  using WidenV = Fp8Traits<C.v_dtype, kProduct>;
  static constexpr int kOutTiles = C.v_head_dim / 8;
  static constexpr int kCopiesOfQ = TileQ::kChunks / 2;

  // 16 columns of Q, as above.
  static __device__ __forceinline__ void load_q(uint32_t sQ, int r, int copy, const void* q, int64_t at, bool valid, int cols) {
    const int col = 16 * copy, count = valid ? cols - col : 0;
    const auto* from = static_cast<const Bits<C.dtype>*>(q) + at + col;
    uint4 even, odd;  // words
    if constexpr (kFp8Q) {
      using WidenQ = Fp8Traits<kFp8Q ? C.dtype : DType::F8E4M3, kProduct>;
      const uint4 x = read(from, count);
      even = {WidenQ::low(x.x), WidenQ::low(x.y), WidenQ::low(x.z), WidenQ::low(x.w)};
      odd = {WidenQ::high(x.x), WidenQ::high(x.y), WidenQ::high(x.z), WidenQ::high(x.w)};
    } else {
      const uint4 x = read(from, count), y = read(from + 8, count - 8);
      even = {x.x, x.z, y.x, y.z};
      odd = {x.y, x.w, y.y, y.w};
    }
    ptx::store_shared_16(sQ + TileQ::offset(r, 2 * copy), even);
    ptx::store_shared_16(sQ + TileQ::offset(r, 2 * copy + 1), odd);
  }

  // S += Q K^T
  static __device__ __forceinline__ void multiply_qk(typename Tile::Scores& rS, const ReadQ& read_q, int row, const ReadK& read_k) {
#pragma unroll
    for (int k = 0; k < C.head_dim / 32; ++k) {
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) read_q.read(a[h], row, 2 * k + h);
#pragma unroll
      for (int t = 0; t < Tile::kKeyTiles; t += 2) {
        read_k.read(b, 8 * t, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) Traits::mma(rS[0][t + i / 2], a[i % 2], WidenK::low(b[i]), WidenK::high(b[i]));
      }
    }
  }

  static __device__ __forceinline__ void round_probabilities(typename Tile::Scores& rS) {
    if constexpr (!kRoundsEarly) return;
#pragma unroll
    for (int t = 0; t < Tile::kKeyTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const uint32_t pair = WidenV::rounded(rS[0][t][e], rS[0][t][e + 1]);
        rS[0][t][e] = ptx::widen_f16(pair & 0xffff);
        rS[0][t][e + 1] = ptx::widen_f16(pair >> 16);
      }
  }

  // O += P V
  static __device__ __forceinline__ void multiply_pv(float (&rO)[1][kOutTiles][4], const typename Tile::Scores& rS, const ReadV& read_v) {
#pragma unroll
    for (int k = 0; k < Tile::kKeyTiles / 2; ++k) {
      uint32_t a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pack(rS[0][2 * k + i / 2][i % 2 * 2], rS[0][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int t = 0; t < kOutTiles; t += 4) {
        read_v.read_transposed(b, 16 * k, t / 4);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t even[2], odd[2];
          WidenV::even_and_odd(b[2 * h], even[0], odd[0]);
          WidenV::even_and_odd(b[2 * h + 1], even[1], odd[1]);
          Traits::mma(rO[0][t + 2 * h], a, even[0], even[1]);
          Traits::mma(rO[0][t + 2 * h + 1], a, odd[0], odd[1]);
        }
      }
    }
  }

 private:
  // P takes the type of V, or of a Q of 16 bits.
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    if constexpr (kFp8Q && !kRoundsEarly) return WidenV::rounded(lo, hi);
    return Traits::pack(lo, hi);
  }

  // 16 bytes; what has no column is 0.
  template <class Element>
  static __device__ __forceinline__ uint4 read(const Element* from, int count) {
    if constexpr (!C.aligned) return gather(from, count);
    return count > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  }
};

}  // namespace fa
