// SPDX-License-Identifier: Apache-2.0
// How the kernel over a cache holds Q, K and V in shared memory and multiplies them, as their types
// ask for it.
#pragma once

#include "attention/score_tile.cuh"
#include "tile/fp8_traits.cuh"
#include "tile/fragment.cuh"
#include "tile/loader.cuh"
#include "tile/mma_traits.cuh"

namespace fa {

// Range of P beside a V in fp8.
template <DType kV, bool kFp8Q>
struct RangeOf {
  using Type = WideRange;
};
template <DType kV>
struct RangeOf<kV, true> {
  using Type = ProbabilityRange<kV>;
};

// One type of 16 bits.
template <Config C, bool kFp8 = bytes_of(C.k_dtype) == 1>
struct CacheOperands {
  static constexpr bool kConverts = false;
  using Range = ProbabilityRange<C.dtype>;
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
  static constexpr int kBytesOfQ = TileQ::kBytes;
};

// K and V in fp8 and Q in fp8 or 16 bits: all are f16 for the products. K and V are widened on the
// way from shared memory to the products, Q on the way there. bf16 has a larger range: rows of Q
// are scaled by a power of two, with which the largest number of a row is in [2^14, 2^15), and
// numbers of 2^-32 of it are still exact. P in f16 has three bits more than in bf16.
//
// ldmatrix gives a lane four neighbouring bytes where it gives two elements of 16 bits. Nothing is
// shuffled for that. Q K^T: a lane has columns 4c to 4c + 3 of 16 for 2c, 2c + 1, 2c + 8 and 2c +
// 9, and Q lies in shared memory in that order. P V: of the 16 columns of two accumulator tiles,
// one has the even ones, the other one the odd ones.
//
// With fp8_products Q stays as it is, and S is made of bytes.
template <Config C>
struct CacheOperands<C, true> {
  static constexpr bool kConverts = true, kFp8Q = bytes_of(C.dtype) == 1, kScalesQ = C.dtype == DType::BF16;
  // P is rounded to fp8 before it is multiplied with descales of its keys, as they are factors of
  // V.
  static constexpr bool kRoundsEarly = kFp8Q && (C.v_token_scales || C.batch_invariant);
  using Range = typename RangeOf<C.v_dtype, kFp8Q>::Type;
  static constexpr bool kPairsColumns = true;
  static constexpr int kLaneCols = 2;
  static constexpr int kElementBytes = 1;
  using Traits = MmaTraits<DType::F16>;
  using Tile = ScoreTile<C, 1>;
  static_assert(kFp8Q || !C.fp8_products, "operands of 8 bits");
  static constexpr int kColsOfQ = C.fp8_products ? C.head_dim / 2 : C.head_dim;  // of 16 bits
  using TileQ = SharedTile<C.block_m, kColsOfQ>;
  using TileK = SharedTile<C.block_n, C.head_dim / 2>;
  using TileV = SharedTile<C.block_n, C.v_head_dim / 2>;
  using ReadQ = FragmentReader<C.block_m, kColsOfQ>;
  using ReadK = FragmentReader<C.block_n, C.head_dim / 2>;
  using ReadV = FragmentReader<C.block_n, C.v_head_dim / 2>;
  using K = Fp8Traits<C.k_dtype>;
  using V = Fp8Traits<C.v_dtype>;
  static constexpr int kOutTiles = C.v_head_dim / 8;
  static constexpr int kBytesOfQ = TileQ::kBytes;
  // Of all groups. Behind them lies what rows of Q are multiplied with where they are scaled.
  // It is read before the groups are merged, whose memory it is then.
  static constexpr int kBytesOfStages = 16 * C.warps / C.block_m * C.stages * (TileK::kBytes + TileV::kBytes);

  // All rows of Q, eight threads a row. Rows that do not exist are zeros.
  static __device__ __forceinline__ void load_q(uint32_t sQ, const FwdParams& f, const WorkTile& work, const Sequence& seq) {
    // Chunks of 16 columns.
    constexpr int kLanes = 8, kChunks = C.head_dim / 16, kHeld = (kChunks + kLanes - 1) / kLanes;
    const auto* q = static_cast<const Bits<C.dtype>*>(f.q) + seq.batch * f.q_stride.batch + seq.q_row * f.q_stride.row;
    for (int item = threadIdx.x; item < C.block_m * kLanes; item += 32 * C.warps) {
      const int r = item / kLanes, lane = item % kLanes, row = work.block_m * C.block_m + r;
      const bool valid = row < row_count<C>(f, seq);
      const auto* from = valid ? q + query_of<C>(f, row) * f.q_stride.row + head_of<C>(f, work.head, row) * f.q_stride.head : q;
      const int cols = valid ? f.head_dim : 0;
      uint4 even[kHeld], odd[kHeld];  // words of a chunk
#pragma unroll
      for (int i = 0; i < kHeld; ++i) read_chunk(from, 16 * (lane + kLanes * i), cols, even[i], odd[i]);
      if constexpr (kScalesQ) {
        const float inverse = scale_row(even, odd);
        if (lane == 0) ptx::store_shared_4(row_scale(sQ, r), __float_as_int(inverse));
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int chunk = lane + kLanes * i;
        if (kChunks % kLanes != 0 && chunk >= kChunks) break;
        if constexpr (C.fp8_products) {
          ptx::store_shared_16(sQ + TileQ::offset(r, chunk), even[i]);
        } else {
          ptx::store_shared_16(sQ + TileQ::offset(r, 2 * chunk), even[i]);
          ptx::store_shared_16(sQ + TileQ::offset(r, 2 * chunk + 1), odd[i]);
        }
      }
    }
  }

  // What a row of Q is to be multiplied with.
  static __device__ __forceinline__ float row_factor(uint32_t sQ, int r) {
    if constexpr (!kScalesQ) return 1.f;
    return __int_as_float(ptx::load_shared_4(row_scale(sQ, r)));
  }

  // S += Q K^T
  static __device__ __forceinline__ void multiply_qk(typename Tile::Scores& rS, const ReadQ& read_q, int row, const ReadK& read_k) {
    if constexpr (C.fp8_products) return multiply_bytes(rS, read_q, row, read_k);
#pragma unroll
    for (int k = 0; k < C.head_dim / 32; ++k) {
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) read_q.read(a[h], row, 2 * k + h);
#pragma unroll
      for (int t = 0; t < Tile::kKeyTiles; t += 2) {
        read_k.read(b, 8 * t, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) Traits::mma(rS[0][t + i / 2], a[i % 2], K::low(b[i]), K::high(b[i]));
      }
    }
  }

  static __device__ __forceinline__ void round_probabilities(typename Tile::Scores& rS) {
    if constexpr (!kRoundsEarly) return;
#pragma unroll
    for (int t = 0; t < Tile::kKeyTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const uint32_t pair = V::rounded(rS[0][t][e], rS[0][t][e + 1]);
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
          V::even_and_odd(b[2 * h], even[0], odd[0]);
          V::even_and_odd(b[2 * h + 1], even[1], odd[1]);
          Traits::mma(rO[0][t + 2 * h], a, even[0], even[1]);
          Traits::mma(rO[0][t + 2 * h + 1], a, odd[0], odd[1]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t row_scale(uint32_t sQ, int r) { return sQ + kBytesOfQ + kBytesOfStages + 4 * r; }

  // P takes the type of V where Q is fp8.
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    if constexpr (kFp8Q && !kRoundsEarly) return V::rounded(lo, hi);
    return Traits::pack(lo, hi);
  }

  // S += Q K^T in 8 bits: ldmatrix puts bytes where mma wants them.
  static __device__ __forceinline__ void multiply_bytes(typename Tile::Scores& rS, const ReadQ& read_q, int row, const ReadK& read_k) {
    using Products = Fp8Products<C.dtype, C.k_dtype>;
#pragma unroll
    for (int k = 0; k < C.head_dim / 32; ++k) {
      uint32_t a[4], b[4];
      read_q.read(a, row, k);
#pragma unroll
      for (int t = 0; t < Tile::kKeyTiles; t += 2) {
        read_k.read(b, 8 * t, k);
        Products::mma(rS[0][t], a, b[0], b[1]);
        Products::mma(rS[0][t + 1], a, b[2], b[3]);
      }
    }
  }

  // 16 columns of Q as words of two 16-bit numbers: the even and the odd ones. For products of 8
  // bits the former are all of them, as they are.
  static __device__ __forceinline__ void read_chunk(const Bits<C.dtype>* row, int col, int cols, uint4& even, uint4& odd) {
    if constexpr (C.fp8_products) {
      even = read(row + col, cols - col);
    } else if constexpr (kFp8Q) {
      using Q = Fp8Traits<kFp8Q ? C.dtype : DType::F8E4M3>;
      const uint4 x = read(row + col, cols - col);
      even = {Q::low(x.x), Q::low(x.y), Q::low(x.z), Q::low(x.w)};
      odd = {Q::high(x.x), Q::high(x.y), Q::high(x.z), Q::high(x.w)};
    } else {
      const uint4 x = read(row + col, cols - col), y = read(row + col + 8, cols - col - 8);
      even = {x.x, x.z, y.x, y.z};
      odd = {x.y, x.w, y.y, y.w};
    }
  }
  // 16 bytes; what has no column is 0.
  template <class Element>
  static __device__ __forceinline__ uint4 read(const Element* from, int count) {
    if constexpr (!C.aligned) return gather(from, count);
    return count > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  }

  // From bf16 to f16, by a power of two, whose inverse is returned. Eight lanes have a row.
  template <int kHeld>
  static __device__ __forceinline__ float scale_row(uint4 (&even)[kHeld], uint4 (&odd)[kHeld]) {
    float largest = 0.f;
    const auto look = [&](const uint4& x) {
      for_each_word(x, [&](uint32_t word) {
        largest = fmaxf(largest, fmaxf(fabsf(ptx::widen_bf16(word & 0xffff)), fabsf(ptx::widen_bf16(word >> 16))));
      });
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) look(even[i]), look(odd[i]);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // Biased; 255: infinity, which stays.
    const int exponent = max(15, __float_as_int(largest) >> 23);
    const float scale = exponent == 255 ? 1.f : __int_as_float((268 - exponent) << 23);
    const auto convert = [scale](uint32_t& word) {
      word = ptx::pack_f16(ptx::widen_bf16(word & 0xffff) * scale, ptx::widen_bf16(word >> 16) * scale);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) for_each_word(even[i], convert), for_each_word(odd[i], convert);
    return exponent == 255 ? 1.f : __int_as_float((exponent - 14) << 23);
  }
  template <class Words, class Apply>
  static __device__ __forceinline__ void for_each_word(Words& x, Apply apply) {
    apply(x.x), apply(x.y), apply(x.z), apply(x.w);
  }
};

}  // namespace fa
