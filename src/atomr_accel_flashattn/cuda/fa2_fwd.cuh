// Forward attention on mma.sync tensor cores: FlashAttention-2 (arXiv 2307.08691), Algorithm 1, for sm_80 and every later architecture.
//
// A block owns block_m rows of Q and walks over the tiles of K and V that its mask lets it see. A warp owns 16 * kBlocks of the rows, so the
// softmax needs no exchange between warps. cp.async fills shared memory ahead of the products.
#pragma once

#include "rows.cuh"
#include "shared_tile.cuh"

namespace fa {

template <Config C>
struct Fa2Forward {
  static_assert(!C.pack_gqa, "rows of this family are those of one head");
  static constexpr int kThreads = C.warps * 32;
  static constexpr int kBlocks = C.block_m / (16 * C.warps);  // 16-row blocks of one warp
  static constexpr int kSteps = C.head_dim / 16;              // of the product over the head dimension
  static_assert(C.block_m % (16 * C.warps) == 0 && C.block_n % 16 == 0, "tiles are made of 16-row blocks");

  using Rows = WarpRows<C, kBlocks>;
  using Type = Element<C.dtype>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  using LoaderQ = TileLoader<C.block_m, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderK = TileLoader<C.block_n, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderV = TileLoader<C.block_n, C.v_head_dim, kThreads, C.aligned, C.exact_head_dim>;

  const FwdParams& p;
  const Band<C> band;  // of the whole block
  const uint32_t sQ, sK, sV;
  uint32_t rQ[C.q_in_registers ? kBlocks : 1][C.q_in_registers ? kSteps : 1][4];
  const int warp_row;  // first row of this warp inside the block
  Rows rows;

  using Scores = typename Rows::Scores;

  __device__ __forceinline__ Fa2Forward(const FwdParams& params, const Work& work, const Sequence& seq, uint32_t shared)
      : p(params),
        band(params, seq, work.block_m * C.block_m, C.block_m),
        sQ(shared),
        sK(C.q_in_registers ? shared : shared + TileQ::kBytes),  // Q leaves its place to K once it is in registers
        sV(sK + C.stages * TileK::kBytes),
        warp_row(warp_index() * Rows::kRows),
        rows(params, work, seq, work.block_m * C.block_m + warp_row) {}

  __device__ __forceinline__ void run() {
    const int head_kv = kv_head_of<C>(p, rows.work.head);
    const LoaderQ load_q(base(p.q, p.q_stride, rows.seq.q_row, rows.work.head), p.q_stride.row, p.head_dim);
    const LoaderK load_k(base(p.k, p.k_stride, rows.seq.k_row, head_kv), p.k_stride.row, p.head_dim);
    const LoaderV load_v(base(p.v, p.v_stride, rows.seq.k_row, head_kv), p.v_stride.row, p.v_head_dim);
    const RowRange keys = band.keys();

    load_q.load(sQ, rows.work.block_m * C.block_m, {0, rows.seq.length_q, 0});
    if constexpr (C.q_in_registers) keep_q();
    if constexpr (C.overlap) {
      walk_overlapped(load_k, load_v, keys);
    } else if constexpr (C.stages == 1) {
      walk_single(load_k, load_v, keys);
    } else {
      walk_staged(load_k, load_v, keys);
    }
    rows.finish();
    rows.store();
  }

 private:
  __device__ __forceinline__ const uint16_t* base(const void* x, const Strides& stride, int64_t row, int head) const {
    return static_cast<const uint16_t*>(x) + rows.seq.batch * stride.batch + row * stride.row + head * stride.head;
  }

  // One buffer each: V loads while S = Q K^T runs, the next K while the softmax and P V run.
  __device__ __forceinline__ void walk_single(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    Scores rS;
    int n = band.first_tile();
    if (n >= 0) load_k.load(sK, n * C.block_n, keys);
    ptx::cp_async_commit();
    while (n >= 0) {
      arrive_all();  // K of this tile is there, and every warp is done with V of the last
      load_v.load(sV, n * C.block_n, keys);
      ptx::cp_async_commit();
      const bool seen = rows.band.sees(n);
      if (seen) multiply_keys(rS, sK);
      arrive_all();  // V is there, and every warp is done with K
      const int next = band.next_tile(n);
      if (next >= 0) load_k.load(sK, next * C.block_n, keys);
      ptx::cp_async_commit();
      if (seen) accumulate(rS, n, sV);
      n = next;
    }
    ptx::cp_async_wait<0>();
  }

  // A ring of `stages` buffers, filled stages - 1 tiles ahead: one barrier a tile.
  __device__ __forceinline__ void walk_staged(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    Scores rS;
    int n = band.first_tile(), ahead = n;
    auto fetch = [&](int stage) {
      if (ahead >= 0) {
        load_k.load(sK + stage * TileK::kBytes, ahead * C.block_n, keys);
        load_v.load(sV + stage * TileV::kBytes, ahead * C.block_n, keys);
        ahead = band.next_tile(ahead);
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
      if (rows.band.sees(n)) {
        multiply_keys(rS, sK + stage * TileK::kBytes);
        accumulate(rS, n, sV + stage * TileV::kBytes);
      }
      stage = stage + 1 == C.stages ? 0 : stage + 1;
      n = band.next_tile(n);
    }
    ptx::cp_async_wait<0>();
  }

  // S of the next tile is multiplied before the softmax of this one, in the same stretch of code, so that the scheduler can put tensor and
  // other instructions of one warp side by side. Two buffers each; K runs one tile ahead of V; one barrier a tile.
  __device__ __forceinline__ void walk_overlapped(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    static_assert(C.stages == 2, "two buffers of K and of V");
    Scores even, odd;
    int n = band.first_tile();
    if (n < 0) return ptx::cp_async_wait<0>();
    int next = band.next_tile(n);
    load_k.load(sK, n * C.block_n, keys);
    ptx::cp_async_commit();
    if (next >= 0) load_k.load(sK + TileK::kBytes, next * C.block_n, keys);
    load_v.load(sV, n * C.block_n, keys);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    multiply_keys(even, sK);
    // K of tile `next` is in buffer `other`, V of tile n in the one that is not.
    auto step = [&](Scores& now, Scores& then, int other) {
      arrive_all();  // both are there, and every warp is done with the buffers filled next
      const int after = next >= 0 ? band.next_tile(next) : -1;
      if (after >= 0) load_k.load(sK + (1 - other) * TileK::kBytes, after * C.block_n, keys);
      if (next >= 0) load_v.load(sV + other * TileV::kBytes, next * C.block_n, keys);
      ptx::cp_async_commit();
      rows.finish_scores(now, n);
      multiply_keys(then, sK + other * TileK::kBytes);  // for nothing after the last tile, where a branch would part the code
      softmax_and_values(now, n, sV + (1 - other) * TileV::kBytes);
      n = next;
      next = after;
    };
    while (true) {
      step(even, odd, 1);
      if (n < 0) break;
      step(odd, even, 0);
      if (n < 0) break;
    }
    ptx::cp_async_wait<0>();
  }

  static __device__ __forceinline__ void arrive_all() {
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
      for (int k = 0; k < kSteps; ++k) read_q.read(rQ[b][k], warp_row + 16 * b, k);
    __syncthreads();  // K overwrites Q
  }

  // S = Q K^T
  __device__ __forceinline__ void multiply_keys(Scores& rS, uint32_t tile_k) {
    const auto read_q = FragmentReader<C.block_m, C.head_dim>::rows_then_chunks(sQ);
    const auto read_k = FragmentReader<C.block_n, C.head_dim>::chunks_then_rows(tile_k);
    Rows::clear(rS);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if constexpr (C.q_in_registers) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[b][i] = rQ[b][k][i];
        } else {
          read_q.read(a[b], warp_row + 16 * b, k);
        }
      }
#pragma unroll
      for (int t = 0; t < Rows::kKeyTiles; t += 2) {
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
  __device__ __forceinline__ void accumulate(Scores& rS, int n, uint32_t tile_v) {
    rows.finish_scores(rS, n);
    softmax_and_values(rS, n, tile_v);
  }

  __device__ __forceinline__ void softmax_and_values(Scores& rS, int n, uint32_t tile_v) {
    if (rows.softmax_tile(rS, n)) rows.rescale_output();
    const auto read_v = FragmentReader<C.block_n, C.v_head_dim>::rows_then_chunks(tile_v);
#pragma unroll
    for (int k = 0; k < Rows::kKeyTiles / 2; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) Rows::pack_probabilities(a[b], rS, b, k);
#pragma unroll
      for (int t = 0; t < Rows::kOutTiles; t += 2) {
        uint32_t bv[4];
        read_v.read_transposed(bv, 16 * k, t / 2);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Type::mma(rows.rO[b][t], a[b], bv[0], bv[1]);
          Type::mma(rows.rO[b][t + 1], a[b], bv[2], bv[3]);
        }
      }
    }
  }
};

template <Config C>
__device__ __forceinline__ void fa2_forward(const FwdParams& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto compute = [&](int tile) {
    const Work work = decode_work(p, tile);
    const Sequence seq = read_sequence<C.varlen>(p, work.batch);
    if (work.block_m * C.block_m < seq.length_q) Fa2Forward<C>(p, work, seq, ptx::shared_address(shared)).run();
  };
  if constexpr (C.persistent) {
    const int64_t tiles = static_cast<int64_t>(p.blocks_m) * p.batch * p.heads;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      compute(static_cast<int>(tile));
      __syncthreads();  // every warp is done with Q, which the next tile overwrites
    }
  } else {
    compute(blockIdx.x);
  }
}

}  // namespace fa
