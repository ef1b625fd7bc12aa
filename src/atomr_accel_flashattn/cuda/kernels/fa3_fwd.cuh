// Forward attention on Hopper: FlashAttention-3 (arXiv 2407.08608). Three producer warps bring tiles of Q, K and V by tensor copies; one to
// four consumer warpgroups of 64 rows multiply with wgmma, and compute the softmax of one tile while the tensor cores work on the next (section 3.2).
#pragma once

#include "attention/rows.cuh"
#include "attention/tile_stream.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/panels.cuh"
#include "tile/ping_pong.cuh"
#include "tile/tma_pipeline.cuh"

namespace fa {

template <Config C>
struct Fa3Forward {
  static constexpr int kConsumers = C.warps / 4 - 1;
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kSteps = C.head_dim / 16;      // of Q K^T
  static constexpr int kValueSteps = C.block_n / 16;  // of P V
  static_assert(C.block_m == kConsumers * kWarpgroupRows, "a consumer warpgroup has 64 rows");
  static_assert(C.aligned, "tensor copies need 16-byte strides");
  static_assert(!C.pack_gqa || !(C.alibi || C.dropout), "slopes and the generator's counter differ between the heads of a tile");

  using Rows = WarpRows<C, 1>;
  using TileQ = PanelTile<kWarpgroupRows, C.head_dim>;  // of one warpgroup
  using TileK = PanelTile<C.block_n, C.head_dim>;
  using TileV = PanelTile<C.block_n, C.v_head_dim>;
  using Stream = TileStream<C.persistent>;

  // Offsets in shared memory; the first is 1024-byte aligned, as the swizzle demands.
  static constexpr int kQ = 0, kK = kQ + kConsumers * TileQ::kBytes, kV = kK + C.stages * TileK::kBytes,
                       kBarriersQ = kV + C.stages * TileV::kBytes;
  static constexpr int kBarriersK = kBarriersQ + kConsumers * Ring<1>::kBytes, kBarriersV = kBarriersK + Ring<C.stages>::kBytes;
  static constexpr int kLanded = kBarriersV + Ring<C.stages>::kBytes, kStream = kLanded + Ring<1>::kBytes;
  static_assert(kStream + Stream::kBytes <= kBarriersQ + 512, "jit/spec.py leaves 512 bytes for barriers");

  // Registers are moved from the loading warpgroup to the computing ones: 64 Ki in all (PTX ISA, setmaxnreg).
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

  static constexpr bool kAllSeen = !C.varlen && !C.left_bound && !C.right_bound;  // every row sees every key that the tensor has

  // L2 policies (createpolicy): q is read once, k and v by many blocks.
  static constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

  const Fa3FwdParams& p;
  const uint32_t shared;
  Ring<1> ring_q;
  Ring<C.stages> ring_k, ring_v;
  Stream stream;
  int landed = 0;  // phase
  static constexpr Turns<C.ping_pong, kConsumers> turns{};

  // `warpgroup`: among the computing ones; of no matter to the loading warps.
  __device__ __forceinline__ Fa3Forward(const Fa3FwdParams& params, uint32_t address, int warpgroup)
      : p(params),
        shared(address),
        ring_q(address + kBarriersQ + warpgroup * Ring<1>::kBytes),
        ring_k(address + kBarriersK),
        ring_v(address + kBarriersV),
        stream(params, address + kStream) {}

  static __device__ __forceinline__ void init_barriers(uint32_t shared) {
    for (int w = 0; w < kConsumers; ++w) Ring<1>::init(shared + kBarriersQ + w * Ring<1>::kBytes, 1, 1);
    Ring<C.stages>::init(shared + kBarriersK, 1, kConsumers);
    Ring<C.stages>::init(shared + kBarriersV, 1, kConsumers);
    ptx::barrier_init(shared + kLanded, 1);
    Stream::init(shared + kStream, 4 * kConsumers + 2);
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

  // Role of the warp that loads K and hands out tiles. Everything in it is uniform over the warp; one elected lane issues.
  __device__ __forceinline__ void produce_keys() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tensor_prefetch(&p.k_map);
    for (Work work = stream.first(); !work.over(); work = stream.hand_out()) {
      const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
      const Band<C> band(p.fwd, seq, work.block_m * C.block_m, C.block_m);
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
      int n = first_tile(work, seq, band);
      if (n < 0) stream.take();
#pragma unroll 1
      for (int next; n >= 0; n = next) {
        next = band.next_tile(n);
        if (next < 0) stream.take();  // the wait below hides how long it takes
        ring_k.wait_empty();
        if (leader) load_tile<TileK>(ring_k, shared + kK, &p.k_map, ring_k.full(), head_kv, seq, n);
        ring_k.advance();
      }
    }
    stream.finish(leader);
  }

  // Role of the warp that loads Q. Every computing warpgroup has rows and a buffer of its own, so that one may begin the next tile while another
  // is still at this one.
  __device__ __forceinline__ void produce_queries() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tensor_prefetch(&p.q_map);
    for (Work work = stream.first(); !work.over(); work = stream.next()) {
      const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
      if (first_tile(work, seq, Band<C>(p.fwd, seq, work.block_m * C.block_m, C.block_m)) < 0) continue;
#pragma unroll 1
      for (int i = 0; i < kConsumers; ++i) {
        // In the order in which they let go of Q: the later rows of a window are done with its last tiles first.
        const int w = C.left_bound ? kConsumers - 1 - i : i;
        const Ring<1> ring = ring_q.neighbour(w);
        ring.wait_empty();
        if (leader) load_queries(ring.full(), w, work, seq);
      }
      ring_q.advance();
    }
  }

  // Role of the warp that loads V, which is needed later than K and may need rows of zeros.
  __device__ __forceinline__ void produce_values() {
    const bool leader = ptx::elect_one();
    if (leader) ptx::tensor_prefetch(&p.v_map);
    for (Work work = stream.first(); !work.over(); work = stream.next()) {
      const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
      const Band<C> band(p.fwd, seq, work.block_m * C.block_m, C.block_m);
      const int head_kv = kv_head_of<C>(p.fwd, work.head);
#pragma unroll 1
      for (int n = first_tile(work, seq, band); n >= 0; n = band.next_tile(n)) {
        ring_v.wait_empty();
        const RowRange seen = values_seen(band);
        if (kAllSeen || seen.covers(n * C.block_n, C.block_n)) {
          if (leader) load_tile<TileV>(ring_v, shared + kV, &p.v_map, ring_v.full(), head_kv, seq, n);
        } else if constexpr (!kAllSeen) {
          if (leader) load_tile<TileV>(ring_v, shared + kV, &p.v_map, shared + kLanded, head_kv, seq, n);
          ptx::barrier_wait(shared + kLanded, landed);
          landed ^= 1;
          zero_unseen(seen, n);
          if (leader) ptx::barrier_arrive(ring_v.full());
        }
        ring_v.advance();
      }
    }
  }

  // Role of a computing warpgroup. The first S of a tile of rows is multiplied beside the end of the tile before it.
  __device__ __forceinline__ void consume(int warpgroup) {
    turns.begin(warpgroup);
    Products r;
    Task task = begin(stream.first(), r, warpgroup, [] {});
    ptx::wgmma_wait<0>();
    ptx::pin(r.S[0]);
    while (!task.work.over()) {
      const int first_row = task.work.block_m * C.block_m;
      Rows rows(p.fwd, task.work, task.seq, first_row + (warp_index() - 4) * 16);
      bool pending = task.n >= 0;  // whether a product with V is still running
      int n = pending ? attend(rows, r, task.walk, task.n, warpgroup) : -1;
      auto settle = [&] {
        ptx::wgmma_wait<0>();
        ptx::pin(rows.rO[0]);
        if (pending) release(ring_v);
        pending = false;
      };
      if constexpr (C.sink_tokens) settle();  // nothing is passed over at the end; to settle later would cost registers that spill
#pragma unroll 1
      for (; n >= 0; n = task.walk.all.next_tile(n)) pass_over(warpgroup, settle);
      Task next{Work::none()};
      if constexpr (C.persistent) {
        next = begin(stream.next(), r, warpgroup, settle);
        rows.finish();
        ptx::wgmma_wait<1>();
        ptx::pin(rows.rO[0]);
        if (pending) release(ring_v);
      } else {
        ptx::conceal(next.work.block_m);
        rows.finish();
        settle();
      }
      if (first_row < row_count<C>(p.fwd, task.seq)) rows.store();
      ptx::wgmma_wait<0>();
      ptx::pin(r.S[0]);
      task = next;
    }
  }

 private:
  // -1 when the rows of this tile do not exist or see nothing; then neither role touches the rings.
  __device__ __forceinline__ int first_tile(const Work& work, const Sequence& seq, const Band<C>& band) const {
    return work.block_m * C.block_m < row_count<C>(p.fwd, seq) ? band.first_tile() : -1;
  }

  // The rows of warpgroup `w`.
  __device__ __forceinline__ void load_queries(uint32_t barrier, int w, const Work& work, const Sequence& seq) const {
    const uint32_t tile = shared + kQ + w * TileQ::kBytes;
    const int row = seq.q_row + query_of<C>(p.fwd, work.block_m * C.block_m + w * kWarpgroupRows);
    ptx::barrier_arrive_expect(barrier, TileQ::kBytes);
    if constexpr (C.pack_gqa) {
      TileQ::load_packed(tile, &p.q_map, barrier, row, work.head, seq.batch, kEvictFirst);
    } else {
      TileQ::load(tile, &p.q_map, barrier, row, work.head, seq.batch, kEvictFirst);
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void load_tile(const Ring<C.stages>& ring, uint32_t tiles, const TensorMap* map, uint32_t barrier,
                                                   int head_kv, const Sequence& seq, int n) {
    ptx::barrier_arrive_expect(barrier, Tile::kBytes);
    Tile::load(tiles + ring.stage * Tile::kBytes, map, barrier, seq.k_row + n * C.block_n, head_kv, seq.batch, kEvictLast);
  }

  // Tensor copies zero what lies outside the tensor, not what lies outside this sequence, or what no row of this block sees: a NaN there would
  // pass through a probability of zero. K needs no zeros: its NaN ends in scores, which are hidden.
  static __device__ __forceinline__ RowRange values_seen(const Band<C>& band) {
    RowRange seen = band.keys();
    if (!C.varlen && seen.end == band.length_k) seen.end = kUnbounded;
    return seen;
  }
  __device__ __forceinline__ void zero_unseen(const RowRange& seen, int n) const {
    const int first = n * C.block_n, last = first + C.block_n;
    zero_rows(min(max(first, seen.end), last) - first, C.block_n);
    if constexpr (C.left_bound) zero_rows(max(first, seen.sinks) - first, min(last, seen.begin) - first);
    ptx::async_proxy_fence();
    __syncwarp();
  }
  __device__ __forceinline__ void zero_rows(int begin, int end) const {
    constexpr int kChunks = C.v_head_dim / 8;
    const uint32_t sV = shared + kV + ring_v.stage * TileV::kBytes;
    for (int i = begin * kChunks + static_cast<int>(threadIdx.x) % 32; i < end * kChunks; i += 32) {
      ptx::store_shared_16(sV + TileV::offset(i / kChunks, i % kChunks), {0, 0, 0, 0});
    }
  }

  // The tiles that a block visits, of which a warpgroup computes those that its own rows see.
  struct Walk {
    Band<C> all, own;
    // The tile after n that this warpgroup computes; -1 when no further one is left. Between window and sink tokens it computes all.
    __device__ __forceinline__ int next(int n) const {
      const int next = all.next_tile(n);
      return next >= 0 && (C.sink_tokens || own.sees(next)) ? next : -1;
    }
  };

  // A tile of rows, and the first tile of keys that this warpgroup computes, or -1.
  struct Task {
    Work work;
    Sequence seq;
    Walk walk;
    int n;
  };

  // Finds that tile and starts its S = Q K^T.
  template <class Settle>
  __device__ __forceinline__ Task begin(const Work& work, Products& r, int warpgroup, Settle settle) {
    const int first_row = max(work.block_m, 0) * C.block_m;
    const Sequence seq = read_sequence<C.varlen>(p.fwd, work.batch);
    const Walk walk{Band<C>(p.fwd, seq, first_row, C.block_m), Band<C>(p.fwd, seq, first_row + warpgroup * kWarpgroupRows, kWarpgroupRows)};
    int n = work.over() ? -1 : first_tile(work, seq, walk.all);
    const bool visited = n >= 0;
    if (visited) ring_q.wait_full();
#pragma unroll 1
    for (; n >= 0 && !walk.own.sees(n); n = walk.all.next_tile(n)) pass_over(warpgroup, settle);
    if (n >= 0) {
      ring_k.wait_full();
      turns.wait(warpgroup);
    } else if (visited) {
      release(ring_q);
    }
    multiply_keys(r, warpgroup);  // of nothing in the end, as a branch would serialise the products
    if (n >= 0) turns.pass(warpgroup);
    return {work, seq, walk, n};
  }

  // Algorithm 2 of the paper: S of the next tile is multiplied while the softmax of this one runs. The last product is still running on return,
  // which gives the next tile of the block that was not computed.
  __device__ __forceinline__ int attend(Rows& rows, Products& r, const Walk& walk, int n, int warpgroup) {
    int next = walk.next(n);
    release(ring_k);
    if (next < 0) release(ring_q);
    rows.finish_scores(r.S, n);
    rows.softmax_tile(r.S, n);  // nothing to rescale yet
    r.pack();
    while (next >= 0) {
      ring_k.wait_full();
      turns.wait(warpgroup);
      multiply_keys(r, warpgroup);
      ring_v.wait_full();
      multiply_values(rows, r);
      turns.pass(warpgroup);
      n = next;
      next = walk.next(n);
      ptx::wgmma_wait<1>();
      ptx::pin(r.S[0]);
      release(ring_k);
      if (next < 0) release(ring_q);  // as early as may be: the loading warp waits for it to begin the next tile
      rows.finish_scores(r.S, n);
      const bool grew = rows.softmax_tile(r.S, n);
      ptx::wgmma_wait<0>();
      ptx::pin(rows.rO[0]);
      release(ring_v);
      r.pack();
      if (grew) rows.rescale_output();
    }
    ring_v.wait_full();
    multiply_values(rows, r);
    return walk.all.next_tile(n);
  }

  // A tile that only other warpgroups see: let go unread, and its turn first, which another may need to issue what this one need not. All warps must
  // have seen it arrive before one thread lets go for all: a warp that came later might find the stage filled anew, which looks like one that was
  // never filled. `settle` ends the product with V that may still run, whose buffer comes before this one.
  template <class Settle>
  __device__ __forceinline__ void pass_over(int warpgroup, Settle settle) {
    turns.wait(warpgroup);
    turns.pass(warpgroup);
    settle();
    ring_k.wait_full();
    ring_v.wait_full();
    ptx::named_barrier_sync(1 + warpgroup, 128);
    release(ring_k);
    release(ring_v);
  }

  // S = Q K^T, as one group
  __device__ __forceinline__ void multiply_keys(Products& r, int warpgroup) {
    using Product = ptx::Wgmma<C.block_n, C.dtype>;
    const uint32_t sQ = shared + kQ + warpgroup * TileQ::kBytes, sK = shared + kK + ring_k.stage * TileK::kBytes;
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
};

template <Config C>
__device__ __forceinline__ void fa3_forward(const Fa3FwdParams& p) {
  using Kernel = Fa3Forward<C>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t address = (ptx::shared_address(shared) + 1023) & ~1023u;
  const int warpgroup = warpgroup_index(), warp = warp_index();
  if (threadIdx.x == 0) Kernel::init_barriers(address);
  __syncthreads();
  Kernel kernel(p, address, max(warpgroup - 1, 0));
  if (warpgroup == 0) {
    if constexpr (Kernel::kConsumers > 1) ptx::registers_release<Kernel::kProducerRegisters>();
    if (warp == 0) kernel.produce_keys();
    if (warp == 1) kernel.produce_values();
    if (warp == 2) kernel.produce_queries();
  } else {
    if constexpr (Kernel::kConsumers > 1) ptx::registers_acquire<Kernel::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
}

}  // namespace fa
