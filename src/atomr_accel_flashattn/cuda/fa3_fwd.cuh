// Forward attention on Hopper: FlashAttention-3 (arXiv 2407.08608). A producer warp brings tiles by tensor copies; one to three consumer
// warpgroups of 64 rows multiply with wgmma, and compute the softmax of one tile while the tensor cores work on the next (section 3.2).
#pragma once

#include "panels.cuh"
#include "rows.cuh"
#include "tile_stream.cuh"

namespace fa {

template <Config C>
struct Fa3Forward {
  static constexpr int kConsumers = C.warps / 4 - 1;
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kSteps = C.head_dim / 16;      // of Q K^T
  static constexpr int kValueSteps = C.block_n / 16;  // of P V
  static_assert(C.block_m == kConsumers * kWarpgroupRows, "a consumer warpgroup has 64 rows");
  static_assert(C.aligned, "tensor copies need 16-byte strides");

  using Rows = WarpRows<C, 1>;
  using TileQ = PanelTile<C.block_m, C.head_dim>;
  using TileK = PanelTile<C.block_n, C.head_dim>;
  using TileV = PanelTile<C.block_n, C.v_head_dim>;
  using Stream = TileStream<C.persistent>;

  // Offsets in shared memory; the first is 1024-byte aligned, as the swizzle demands.
  static constexpr int kQ = 0, kK = kQ + TileQ::kBytes, kV = kK + C.stages * TileK::kBytes, kBarriersQ = kV + C.stages * TileV::kBytes;
  static constexpr int kBarriersK = kBarriersQ + Ring<1>::kBytes, kBarriersV = kBarriersK + Ring<C.stages>::kBytes;
  static constexpr int kStream = kBarriersV + Ring<C.stages>::kBytes;
  static_assert(kStream + Stream::kBytes <= kBarriersQ + 512, "jit/spec.py leaves 512 bytes for barriers");

  // Registers are moved from the loading warpgroup to the computing ones: 64 Ki in all (PTX ISA, setmaxnreg).
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

  // L2 policies (createpolicy): q is read once, k and v by many blocks.
  static constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

  const Fa3FwdParams& p;
  const uint32_t shared;
  Ring<1> ring_q;
  Ring<C.stages> ring_k, ring_v;
  Stream stream;

  __device__ __forceinline__ Fa3Forward(const Fa3FwdParams& params, uint32_t address)
      : p(params),
        shared(address),
        ring_q(address + kBarriersQ),
        ring_k(address + kBarriersK),
        ring_v(address + kBarriersV),
        stream(params, address + kStream) {}

  static __device__ __forceinline__ void init_barriers(uint32_t shared) {
    Ring<1>::init(shared + kBarriersQ, 1, kConsumers);
    Ring<C.stages>::init(shared + kBarriersK, 1, kConsumers);
    Ring<C.stages>::init(shared + kBarriersV, 1, kConsumers);
    Stream::init(shared + kStream, 4 * kConsumers);
    ptx::barrier_init_fence();
  }

  // Registers that asynchronous products write or read: not to be touched until they are waited for.
  struct Products {
    typename Rows::Scores S;
    uint32_t P[kValueSteps][4];

    __device__ __forceinline__ void pack() {
#pragma unroll
      for (int k = 0; k < kValueSteps; ++k) Rows::pack_probabilities(P[k], S, 0, k);
    }
  };

  // Role of the loading warp. Everything in it is uniform over the warp; one elected lane issues.
  __device__ __forceinline__ void produce() {
    const bool leader = ptx::elect_one();
    if (leader) {
      ptx::tensor_prefetch(&p.q_map);
      ptx::tensor_prefetch(&p.k_map);
      ptx::tensor_prefetch(&p.v_map);
    }
    for (int tile = Stream::first(); tile < p.tiles; tile = stream.hand_out(leader)) {
      stream.take(leader);
      const Work work = decode_work(p.fwd, tile);
      const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
      const Band<C> band(p.fwd, seq, work.block_m * C.block_m, C.block_m);
      int n = first_tile(work, seq, band);
      if (n < 0) continue;
      load_q(work, seq, leader);
      const int head_kv = work.head / p.fwd.heads_per_kv;
      load_keys(head_kv, seq, n, leader);
#pragma unroll 1
      for (int next = band.next_tile(n); next >= 0; n = next, next = band.next_tile(n)) {
        load_keys(head_kv, seq, next, leader);  // K runs one tile ahead of V, as the consumers read it
        load_values(head_kv, seq, n, leader);
      }
      load_values(head_kv, seq, n, leader);
    }
    stream.finish(leader);
  }

  // Role of a computing warpgroup.
  __device__ __forceinline__ void consume(int warpgroup) {
    int tile = Stream::first();
    Work work = decode_work(p.fwd, min(tile, p.tiles - 1));
    while (tile < p.tiles) {
      const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
      const int first_row = work.block_m * C.block_m;
      const Band<C> band(p.fwd, seq, first_row, C.block_m);
      Rows rows(p.fwd, work, seq, first_row + (warp_index() - 4) * 16);
      const int n = first_tile(work, seq, band);
      Products r;
      if (n >= 0) attend(rows, r, band, n, warpgroup);
      // Beside the last product: the integer divisions that find the next tile, and the end of the softmax.
      tile = stream.next();
      work = decode_work(p.fwd, min(tile, p.tiles - 1));
      rows.finish();
      ptx::wgmma_wait<0>();
      ptx::pin(rows.rO[0]);
      if (n >= 0) release(ring_v);
      if (first_row < seq.length_q) rows.store();
    }
  }

 private:
  // -1 when the rows of this tile do not exist or see nothing; then neither role touches the rings.
  static __device__ __forceinline__ int first_tile(const Work& work, const Sequence& seq, const Band<C>& band) {
    return work.block_m * C.block_m < seq.length_q ? band.first_tile() : -1;
  }

  __device__ __forceinline__ void load_q(const Work& work, const Sequence& seq, bool leader) {
    ring_q.wait_empty();
    if (leader) {
      ptx::barrier_arrive_expect(ring_q.full(), TileQ::kBytes);
      TileQ::load(shared + kQ, &p.q_map, ring_q.full(), seq.q_row + work.block_m * C.block_m, work.head, seq.batch, kEvictFirst);
    }
    ring_q.advance();
  }
  __device__ __forceinline__ void load_keys(int head_kv, const Sequence& seq, int n, bool leader) {
    load_tile<TileK>(ring_k, shared + kK, &p.k_map, head_kv, seq, n, leader);
  }
  __device__ __forceinline__ void load_values(int head_kv, const Sequence& seq, int n, bool leader) {
    load_tile<TileV>(ring_v, shared + kV, &p.v_map, head_kv, seq, n, leader);
  }
  template <class Tile>
  __device__ __forceinline__ void load_tile(Ring<C.stages>& ring, uint32_t tiles, const TensorMap* map, int head_kv, const Sequence& seq,
                                            int n, bool leader) {
    ring.wait_empty();
    if (leader) {
      ptx::barrier_arrive_expect(ring.full(), Tile::kBytes);
      Tile::load(tiles + ring.stage * Tile::kBytes, map, ring.full(), seq.k_row + n * C.block_n, head_kv, seq.batch, kEvictLast);
    }
    ring.advance();
  }

  // Algorithm 2 of the paper: S of the next tile is multiplied while the softmax of this one runs. The last product is still running on return.
  __device__ __forceinline__ void attend(Rows& rows, Products& r, const Band<C>& band, int n, int warpgroup) {
    ring_q.wait_full();
    ring_k.wait_full();
    multiply_keys(r, warpgroup);
    ptx::wgmma_wait<0>();
    ptx::pin(r.S[0]);
    release(ring_k);
    rows.finish_scores(r.S, n);
    rows.softmax_tile(r.S, n);  // nothing to rescale yet
    r.pack();
    for (int next = band.next_tile(n); next >= 0; n = next, next = band.next_tile(n)) {
      ring_k.wait_full();
      multiply_keys(r, warpgroup);
      wait_values(band, n, warpgroup);
      multiply_values(rows, r);
      ptx::wgmma_wait<1>();
      ptx::pin(r.S[0]);
      release(ring_k);
      rows.finish_scores(r.S, next);
      const bool grew = rows.softmax_tile(r.S, next);
      ptx::wgmma_wait<0>();
      ptx::pin(rows.rO[0]);
      release(ring_v);
      r.pack();
      if (grew) rows.rescale_output();
    }
    release(ring_q);
    wait_values(band, n, warpgroup);
    multiply_values(rows, r);
  }

  // S = Q K^T, as one group
  __device__ __forceinline__ void multiply_keys(Products& r, int warpgroup) {
    using Product = ptx::Wgmma<C.block_n, C.dtype>;
    const uint32_t sQ = shared + kQ + warpgroup * kWarpgroupRows * TileQ::kRowBytes, sK = shared + kK + ring_k.stage * TileK::kBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) Product::keys(r.S[0], TileQ::along_columns(sQ, k), TileK::along_columns(sK, k), k > 0);
    ptx::wgmma_commit();
  }

  // O += P V, as one group
  __device__ __forceinline__ void multiply_values(Rows& rows, const Products& r) {
    using Product = ptx::Wgmma<C.v_head_dim, C.dtype>;
    const uint32_t sV = shared + kV + ring_v.stage * TileV::kBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kValueSteps; ++k) Product::values(rows.rO[0], r.P[k], TileV::along_rows(sV, k));
    ptx::wgmma_commit();
  }

  // A whole warpgroup is done with the current stage: wgmma_wait has made that true of each of its threads' reads.
  template <int kStages>
  __device__ __forceinline__ void release(Ring<kStages>& ring) {
    if (threadIdx.x % 128 == 0) ptx::barrier_arrive(ring.empty());
    ring.advance();
  }

  // Tensor copies zero what lies outside the tensor, not what lies outside this sequence, or what no row of this block sees: a NaN there would
  // pass through a probability of zero. Every warpgroup writes the zeros it needs; two of them write the same ones.
  __device__ __forceinline__ void wait_values(const Band<C>& band, int n, int warpgroup) {
    ring_v.wait_full();
    if constexpr (C.varlen || C.left_bound || C.right_bound) {
      const int first = n * C.block_n;
      RowRange seen = band.keys();
      if (!C.varlen && seen.end == band.length_k) seen.end = first + C.block_n;  // past the tensor's end the copy has written zeros
      if (seen.covers(first, C.block_n)) return;
      const uint32_t sV = shared + kV + ring_v.stage * TileV::kBytes;
      constexpr int kChunks = C.v_head_dim / 8;
      for (int i = threadIdx.x % 128; i < C.block_n * kChunks; i += 128) {
        if (!seen.holds(first + i / kChunks)) ptx::store_shared_16(sV + TileV::offset(i / kChunks, i % kChunks), {0, 0, 0, 0});
      }
      ptx::async_proxy_fence();
      ptx::named_barrier_sync(1 + warpgroup, 128);
    }
  }
};

template <Config C>
__device__ __forceinline__ void fa3_forward(const Fa3FwdParams& p) {
  using Kernel = Fa3Forward<C>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t address = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int warpgroup = warpgroup_index(), warp = warp_index();
  if (threadIdx.x == 0) Kernel::init_barriers(address);
  __syncthreads();
  Kernel kernel(p, address);
  if (warpgroup == 0) {
    if constexpr (Kernel::kConsumers > 1) ptx::registers_release<Kernel::kProducerRegisters>();
    if (warp == 0) kernel.produce();
  } else {
    if constexpr (Kernel::kConsumers > 1) ptx::registers_acquire<Kernel::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
}

}  // namespace fa
