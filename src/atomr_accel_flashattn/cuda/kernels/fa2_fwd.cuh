// SPDX-License-Identifier: Apache-2.0
// Forward attention with mma.sync: FlashAttention-2 (arXiv 2307.08691), Algorithm 1, for sm_80 and
// every later architecture.
//
// A block owns block_m rows of Q and visits the tiles of K and V that its mask lets it see. A warp
// owns 16 * kBlocks of the rows, so the softmax needs no exchange between warps. cp.async pipelines
// load K and V ahead of the products.
#pragma once

#include "attention/rows.cuh"
#include "attention/unowned_rows.cuh"
#include "tile/cp_async_pipeline.cuh"
#include "tile/fragment.cuh"
#include "tile/loader.cuh"

namespace fa {

template <Config C>
struct Fa2Forward {
  static_assert(!C.pack_gqa, "rows of this family are those of one head");
  static constexpr int kThreads = C.warps * 32;
  static constexpr int kBlocks = C.block_m / (16 * C.warps);  // 16-row blocks of one warp
  static constexpr int kSteps = C.head_dim / 16;              // k steps of Q K^T
  static_assert(C.block_m % (16 * C.warps) == 0 && C.block_n % 16 == 0, "tiles are made of 16-row blocks");

  using Rows = WarpRows<C, kBlocks>;
  using Traits = MmaTraits<C.dtype>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  using PipelineK = CpAsyncPipeline<C.stages, TileK::kBytes, 2>;
  using PipelineV = CpAsyncPipeline<C.stages, TileV::kBytes, 2>;
  using LoaderQ = TileLoader<C.block_m, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderK = TileLoader<C.block_n, C.head_dim, kThreads, C.aligned, C.exact_head_dim>;
  using LoaderV = TileLoader<C.block_n, C.v_head_dim, kThreads, C.aligned, C.exact_head_dim>;

  const FwdParams& p;
  const Band<C> band;  // of the whole block
  const uint32_t sQ, sK, sV;
  const int warp_row;  // first row of this warp inside the block
  Rows rows;

  using Scores = typename Rows::Scores;

  __device__ __forceinline__ Fa2Forward(const FwdParams& params, const WorkTile& work, const Sequence& seq, uint32_t shared)
      : p(params),
        band(params, seq, work.block_m * C.block_m, C.block_m),
        sQ(shared),
        sK(shared + TileQ::kBytes),
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
    mainloop(load_k, load_v, keys);
    rows.finalize([&] { return p.lse; });
    rows.store();
  }

 private:
  __device__ __forceinline__ const uint16_t* base(const void* x, const Strides& stride, int64_t row, int head) const {
    return static_cast<const uint16_t*>(x) + rows.seq.batch * stride.batch + row * stride.row + head * stride.head;
  }

  // Algorithm 1 over a pipeline of K and one of V. With one stage, V of a tile loads during S = Q
  // K^T and K of the next during softmax and P V; each further stage fetches both one tile earlier.
  __device__ __forceinline__ void mainloop(const LoaderK& load_k, const LoaderV& load_v, RowRange keys) {
    PipelineK pipe_k(sK);
    PipelineV pipe_v(sV);
    const auto fetch_k = [&](int n) {
      pipe_k.produce([&](uint32_t tile) {
        if (n >= 0) load_k.load(tile, n * C.block_n, keys);
      });
    };
    const auto fetch_v = [&](int n) {
      pipe_v.produce([&](uint32_t tile) {
        if (n >= 0) load_v.load(tile, n * C.block_n, keys);
      });
    };
    Scores rS;
    int n = band.first_tile(), ahead = n;
    fetch_k(ahead);
#pragma unroll
    for (int stage = 1; stage < C.stages; ++stage) {
      fetch_v(ahead);
      ahead = band.next_tile(ahead);
      fetch_k(ahead);
    }
    while (n >= 0) {
      const uint32_t tile_k = pipe_k.consumer_wait();
      fetch_v(ahead);
      const bool seen = rows.band.sees(n);
      if (seen) multiply_qk(rS, tile_k);
      pipe_k.consumer_release();
      const uint32_t tile_v = pipe_v.consumer_wait();
      ahead = band.next_tile(ahead);
      fetch_k(ahead);
      if (seen) {
        rows.apply_bias_and_mask(rS, n);
        if (rows.online_softmax(rS, n)) rows.rescale_output();
        multiply_pv(rS, tile_v);
      }
      pipe_v.consumer_release();
      n = C.stages == 1 ? ahead : band.next_tile(n);  // one stage: `ahead` is the next tile
    }
    ptx::cp_async_wait<0>();
  }

  // S = Q K^T
  __device__ __forceinline__ void multiply_qk(Scores& rS, uint32_t tile_k) {
    const auto read_q = FragmentReader<C.block_m, C.head_dim>::rows_then_chunks(sQ);
    const auto read_k = FragmentReader<C.block_n, C.head_dim>::chunks_then_rows(tile_k);
    Rows::clear(rS);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) read_q.read(a[b], warp_row + 16 * b, k);
#pragma unroll
      for (int t = 0; t < Rows::kKeyTiles; t += 2) {
        uint32_t bk[4];
        read_k.read(bk, 8 * t, k);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Traits::mma(rS[b][t], a[b], bk[0], bk[1]);
          Traits::mma(rS[b][t + 1], a[b], bk[2], bk[3]);
        }
      }
    }
  }

  // O += P V
  __device__ __forceinline__ void multiply_pv(const Scores& rS, uint32_t tile_v) {
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
          Traits::mma(rows.rO[b][t], a[b], bv[0], bv[1]);
          Traits::mma(rows.rO[b][t + 1], a[b], bv[2], bv[3]);
        }
      }
    }
  }
};

template <Config C>
__device__ __forceinline__ void fa2_forward(const FwdParams& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto compute = [&](int tile) {
    const WorkTile work = decode_work_tile(p, tile);
    const Sequence seq = read_sequence<C.varlen>(p, work.batch);
    if (C.varlen && work.batch == p.batch - 1) {
      const int tiles = p.blocks_m * p.heads;  // of this sequence
      write_unowned_rows<C>(p, work.block_m * p.heads + work.head, tiles, threadIdx.x, Fa2Forward<C>::kThreads);
    }
    if (work.block_m * C.block_m < seq.length_q) Fa2Forward<C>(p, work, seq, ptx::shared_address(shared)).run();
  };
  if constexpr (C.persistent) {
    const int64_t tiles = static_cast<int64_t>(p.blocks_m) * p.batch * p.heads;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      compute(static_cast<int>(tile));
      __syncthreads();  // all warps have read Q, which the next tile overwrites
    }
  } else {
    compute(blockIdx.x);
  }
}

}  // namespace fa
