// Forward attention on mma.sync tensor cores: FlashAttention-2 (arXiv 2307.08691), Algorithm 1, for sm_80 and every later architecture.
//
// A block owns block_m rows of Q and walks over the tiles of K and V that its mask lets it see. A warp owns 16 * kBlocks of the rows, so the
// softmax needs no exchange between warps. cp.async fills shared memory ahead of the products.
#pragma once

#include "element.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "philox.cuh"
#include "scheduler.cuh"
#include "score.cuh"
#include "sequence.cuh"
#include "shared_tile.cuh"
#include "softmax.cuh"

namespace fa {

template <Config C>
struct Forward {
  static constexpr int kThreads = C.warps * 32;
  static constexpr int kBlocks = C.block_m / (16 * C.warps);  // 16-row blocks of one warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kKeyTiles = C.block_n / 8;
  static constexpr int kOutTiles = C.v_head_dim / 8;
  static constexpr int kSteps = C.head_dim / 16;  // of the product over the head dimension
  static_assert(C.block_m % (16 * C.warps) == 0 && C.block_n % 16 == 0, "tiles are made of 16-row blocks");
  static_assert(!C.dropout || C.block_n % 32 == 0, "one Philox call covers 32 keys");

  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  using LoaderQ = TileLoader<C.block_m, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderK = TileLoader<C.block_n, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderV = TileLoader<C.block_n, C.v_head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using Type = Element<C.dtype>;

  const FwdParams& p;
  const Work work;
  const Sequence seq;
  const int first_row;       // of the block, inside the sequence
  const int warp_first_row;  // of this warp, inside the sequence
  const Band<C> block_band, warp_band;
  const Score<C> score;
  const uint32_t sQ, sK, sV;

  float rO[kBlocks][kOutTiles][4];
  float rS[kBlocks][kKeyTiles][4];
  uint32_t rQ[C.q_in_registers ? kBlocks : 1][C.q_in_registers ? kSteps : 1][4];
  OnlineSoftmax<kBlocks> softmax;

  __device__ __forceinline__ Forward(const FwdParams& params, const Work& w, const Sequence& s, uint32_t shared)
      : p(params),
        work(w),
        seq(s),
        first_row(w.block_m * C.block_m),
        warp_first_row(first_row + static_cast<int>(threadIdx.x) / 32 * kWarpRows),
        block_band(params, s, first_row, C.block_m),
        warp_band(params, s, warp_first_row, kWarpRows),
        score(params, w.batch, w.head),
        sQ(shared),
        sK(C.q_in_registers ? shared : shared + TileQ::kBytes),  // Q leaves its place to K once it is in registers
        sV(sK + C.stages * TileK::kBytes) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rO[b][t][e] = 0.f;
  }

  __device__ __forceinline__ void run() {
    const LoaderQ load_q(base(p.q, p.q_stride, seq.q_row, work.head), p.q_stride.row, p.head_dim);
    const LoaderK load_k(base(p.k, p.k_stride, seq.k_row, work.head / p.heads_per_kv), p.k_stride.row, p.head_dim);
    const LoaderV load_v(base(p.v, p.v_stride, seq.k_row, work.head / p.heads_per_kv), p.v_stride.row, p.v_head_dim);
    const RowRange keys = {block_band.key_begin(), block_band.key_end(), C.sink_tokens ? min(block_band.sinks, block_band.key_end()) : 0};

    load_q.load(sQ, first_row, {0, seq.length_q, 0});
    if constexpr (C.q_in_registers) keep_q();
    if constexpr (C.stages == 1) {
      walk_single(load_k, load_v, keys);
    } else {
      walk_staged(load_k, load_v, keys);
    }
    store();
  }

 private:
  __device__ __forceinline__ const uint16_t* base(const void* x, const Strides& stride, int64_t row, int head) const {
    return static_cast<const uint16_t*>(x) + seq.batch * stride.batch + row * stride.row + head * stride.head;
  }

  // One buffer each: V loads while S = Q K^T runs, the next K while the softmax and P V run.
  __device__ __forceinline__ void walk_single(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    int n = block_band.first_tile();
    if (n >= 0) load_k.load(sK, n * C.block_n, keys);
    ptx::cp_async_commit();
    while (n >= 0) {
      arrive_all();  // K of this tile is there, and every warp is done with V of the last
      load_v.load(sV, n * C.block_n, keys);
      ptx::cp_async_commit();
      const bool seen = warp_band.sees(n);
      if (seen) compute_scores(sK);
      arrive_all();  // V is there, and every warp is done with K
      const int next = block_band.next_tile(n);
      if (next >= 0) load_k.load(sK, next * C.block_n, keys);
      ptx::cp_async_commit();
      if (seen) accumulate(n, sV);
      n = next;
    }
    ptx::cp_async_wait<0>();
  }

  // A ring of `stages` buffers, filled stages - 1 tiles ahead: one barrier a tile.
  __device__ __forceinline__ void walk_staged(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    int n = block_band.first_tile(), ahead = n;
    auto fetch = [&](int stage) {
      if (ahead >= 0) {
        load_k.load(sK + stage * TileK::kBytes, ahead * C.block_n, keys);
        load_v.load(sV + stage * TileV::kBytes, ahead * C.block_n, keys);
        ahead = block_band.next_tile(ahead);
      }
      ptx::cp_async_commit();  // also when empty, so that the count of groups in flight stays fixed
    };
#pragma unroll
    for (int stage = 0; stage < C.stages - 1; ++stage) fetch(stage);
    int stage = 0;
    while (n >= 0) {
      ptx::cp_async_wait<C.stages - 2>();
      __syncthreads();  // this tile is there, and every warp is done with the one before, whose buffer is filled next
      fetch(stage == 0 ? C.stages - 1 : stage - 1);
      if (warp_band.sees(n)) {
        compute_scores(sK + stage * TileK::kBytes);
        accumulate(n, sV + stage * TileV::kBytes);
      }
      stage = stage + 1 == C.stages ? 0 : stage + 1;
      n = block_band.next_tile(n);
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ void arrive_all() const {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void keep_q() {
    ptx::cp_async_commit();
    arrive_all();
    const auto read_q = FragmentReader<C.block_m, C.head_dim>::rows_then_chunks(sQ);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) read_q.read(rQ[b][k], warp_row() + 16 * b, k);
    __syncthreads();  // K overwrites Q
  }

  __device__ __forceinline__ int warp_row() const { return static_cast<int>(threadIdx.x) / 32 * kWarpRows; }

  // S = Q K^T
  __device__ __forceinline__ void compute_scores(uint32_t tile_k) {
    const auto read_q = FragmentReader<C.block_m, C.head_dim>::rows_then_chunks(sQ);
    const auto read_k = FragmentReader<C.block_n, C.head_dim>::chunks_then_rows(tile_k);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[b][t][e] = 0.f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if constexpr (C.q_in_registers) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[b][i] = rQ[b][k][i];
        } else {
          read_q.read(a[b], warp_row() + 16 * b, k);
        }
      }
#pragma unroll
      for (int t = 0; t < kKeyTiles; t += 2) {
        uint32_t bk[4];
        read_k.read(bk, 8 * t, k);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Type::mma(rS[b][t], a[b], bk[0], bk[1]);
          Type::mma(rS[b][t + 1], a[b], bk[2], bk[3]);
        }
      }
    }
  }

  // Bias, mask, softmax, O += P V
  __device__ __forceinline__ void accumulate(int n, uint32_t tile_v) {
    transform_scores(n);
    if (warp_band.cuts(n)) hide_keys(n);
    float rescale[kBlocks][2];
    if (softmax.update(rS, rescale, score.factor)) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) rO[b][t][e] *= rescale[b][e / 2];
    }
    if constexpr (C.dropout) drop(n);

    const auto read_v = FragmentReader<C.block_n, C.v_head_dim>::rows_then_chunks(tile_v);
#pragma unroll
    for (int k = 0; k < kKeyTiles / 2; ++k) {
      uint32_t a[kBlocks][4];  // two accumulator tiles of S are, packed, the A operand of P V
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[b][i] = Type::pack(rS[b][2 * k + i / 2][i % 2 * 2], rS[b][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int t = 0; t < kOutTiles; t += 2) {
        uint32_t bv[4];
        read_v.read_transposed(bv, 16 * k, t / 2);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Type::mma(rO[b][t], a[b], bv[0], bv[1]);
          Type::mma(rO[b][t + 1], a[b], bv[2], bv[3]);
        }
      }
    }
  }

  // Where this lane's accumulator elements lie: row lane / 4 (+ 8) of a 16-row block, columns 2 * (lane % 4) (+ 1) of an 8-key tile.
  static __device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int lane_col() { return static_cast<int>(threadIdx.x) % 4 * 2; }
  __device__ __forceinline__ int position(int b, int r) const { return warp_band.p_first + 16 * b + 8 * r + lane_row(); }

  __device__ __forceinline__ void transform_scores(int n) {
    if constexpr (C.alibi || Score<C>::kInLog2) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float first = static_cast<float>(n * C.block_n + lane_col() - position(b, r));
#pragma unroll
          for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              rS[b][t][2 * r + e] = score.apply(rS[b][t][2 * r + e], first + static_cast<float>(8 * t + e));
            }
        }
    }
  }

  __device__ __forceinline__ void hide_keys(int n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = warp_band.row(position(b, r), n * C.block_n + lane_col());
#pragma unroll
        for (int t = 0; t < kKeyTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (row.hides(8 * t + e)) rS[b][t][2 * r + e] = negative_infinity();
          }
      }
  }

  __device__ __forceinline__ void drop(int n) {
    const Philox philox(p.rng);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kKeyTiles; t += 4) {
        const uint32_t row_group = (warp_first_row / 16 + b) * 8 + lane_row();
        const uint32_t key_group = (n * C.block_n / 32 + t / 4) * 4 + threadIdx.x % 4;
        const DropoutBytes bytes = {philox(row_group, key_group, work.batch * p.heads + work.head)};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int r = i / 8, tile = i / 2 % 4, e = i % 2;
          if (bytes.at(r, tile, e) >= p.dropout_threshold) rS[b][t + tile][2 * r + e] = 0.f;
        }
      }
  }

  __device__ __forceinline__ void store() {
    auto* out = static_cast<uint16_t*>(p.o) + seq.batch * p.o_stride.batch + seq.q_row * p.o_stride.row + work.head * p.o_stride.head;
    const float sink = C.learned_sink ? p.learned_sink[work.head] * kLog2e : 0.f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_first_row + 16 * b + 8 * r + lane_row();
        const float sum = quad_reduce(softmax.sum[b][r], [](float x, float y) { return x + y; });
        RowEnd end = finish_row<C>(sum, softmax.max[b][r] * score.factor, sink);
        if (p.lse != nullptr && lane_col() == 0 && row < seq.length_q) {
          p.lse[work.batch * p.lse_batch_stride + work.head * p.lse_head_stride + seq.q_row + row] = end.lse;
        }
        if constexpr (C.dropout) end.scale *= p.dropout_rescale;
#pragma unroll
        for (int t = 0; t < kOutTiles; t += 4) {
          uint32_t w[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) w[i] = Type::pack(rO[b][t + i][2 * r] * end.scale, rO[b][t + i][2 * r + 1] * end.scale);
          store_row_32<C>(out + row * p.o_stride.row, 8 * t, p.v_head_dim, w, row < seq.length_q);
        }
      }
  }
};

template <Config C>
__device__ __forceinline__ void forward(const FwdParams& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Work work = decode_work(p, blockIdx.x);
  const Sequence seq = read_sequence<C.varlen>(p, work.batch);
  if (work.block_m * C.block_m >= seq.length_q) return;
  Forward<C>(p, work, seq, ptx::shared_address(shared)).run();
}

}  // namespace fa
