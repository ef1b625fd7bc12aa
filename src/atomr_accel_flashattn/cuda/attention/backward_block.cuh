// SPDX-License-Identifier: Apache-2.0
// What a block of the backward has, whatever way it computes: its keys and the queries that see
// them, stages of Q and dO, and where dQ, dK and dV go.
#pragma once

#include "attention/dq_sum.cuh"
#include "attention/dq_turns.cuh"
#include "attention/epilogue.cuh"
#include "attention/kv_parts.cuh"
#include "attention/mask.cuh"
#include "attention/row_statistics.cuh"
#include "attention/score.cuh"
#include "tile/loader.cuh"
#include "tile/product.cuh"

namespace fa {

// Of the query heads of a sequence, that blocks visit: those of a KV head, or several of these.
template <Config C>
__device__ __forceinline__ int head_parts(const BwdParams& p) {
  return C.head_split ? p.heads_kv * p.head_splits : p.heads_kv;
}

template <Config C>
struct BackwardBlock {
  static constexpr int kThreads = C.warps * 32;

  using Traits = MmaTraits<C.dtype>;
  using TileQ = SharedTile<C.block_m, C.head_dim>;
  using TileO = SharedTile<C.block_m, C.v_head_dim>;
  using TileK = SharedTile<C.block_n, C.head_dim>;
  using TileV = SharedTile<C.block_n, C.v_head_dim>;
  template <int kRows, int kCols>
  using Loader = TileLoader<kRows, kCols, kThreads, C.aligned, C.exact_head_dim>;
  // As many columns of dQ at a time as 64 registers hold.
  static constexpr int kColsOfDq = C.block_m * C.head_dim / kThreads <= 64 ? C.head_dim : C.head_dim / 2;
  using ProductQ = WarpProduct<C.dtype, C.block_m, kColsOfDq, C.warps>;

  // Q, dO, LSE and delta of one tile of queries.
  static constexpr int kStages = C.stages, kStageBytes = TileQ::kBytes + TileO::kBytes + C.block_m * 8;
  static_assert(kStages >= 1 && kStages <= 3 && kThreads >= C.block_m);

  struct QueryTile {
    int head, m;
  };
  const BwdParams& p;
  const Sequence seq;
  const int batch;
  const int part;  // of the query heads: those of a KV head; split, counted over all KV heads
  const int first_key;
  const Band<C> band;   // of all queries of the sequence
  const RowRange rows;  // those that see some of these keys; others count as zeros: they may be NaN
  const TileRange tiles;

  QueryTile ahead;  // what is loaded next
  const Loader<C.block_m, C.head_dim> load_q;
  const Loader<C.block_m, C.v_head_dim> load_o;
  const uint16_t *q_ahead, *dout_ahead;

  __device__ __forceinline__ BackwardBlock(const BwdParams& params, const Sequence& s, int block_n, int part_of_heads, int sequence)
      : p(params),
        seq(s),
        batch(sequence),
        part(part_of_heads),
        first_key(block_n * C.block_n),
        band(params.fwd, s, 0, s.length_q),
        rows(band.queries(first_key, C.block_n)),
        tiles(band.query_tiles(first_key, C.block_n)),
        ahead{first_head(), first_tile()},
        load_q(nullptr, p.fwd.q_stride.row, p.fwd.head_dim),
        load_o(nullptr, p.dout_stride.row, p.fwd.v_head_dim) {
    find_ahead();
  }

  static __device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int lane_col() { return static_cast<int>(threadIdx.x) % 4 * 2; }

  __device__ __forceinline__ const uint16_t* base(const void* x, const Strides& stride, int64_t row, int head) const {
    return static_cast<const uint16_t*>(x) + seq.batch * stride.batch + row * stride.row + head * stride.head;
  }
  static __device__ __forceinline__ int next(int stage, int steps = 1) {
    stage += steps;
    return stage >= kStages ? stage - kStages : stage;
  }
  // Deterministic: from the last tile to the first (dq_turns.cuh).
  static constexpr int kStep = C.deterministic ? -1 : 1;
  __device__ __forceinline__ int first_tile() const { return C.deterministic ? tiles.end - 1 : tiles.begin; }
  __device__ __forceinline__ bool is_last(const QueryTile& tile) const { return tile.m == (C.deterministic ? tiles.begin : tiles.end - 1); }
  __device__ __forceinline__ void advance(QueryTile& tile) const {
    if (is_last(tile)) {
      tile = {tile.head + 1, first_tile()};
    } else {
      tile.m += kStep;
    }
  }

  // Starts to copy K and V of the block.
  __device__ __forceinline__ void load_keys(uint32_t sK, uint32_t sV) const {
    const FwdParams& f = p.fwd;
    const Loader<C.block_n, C.head_dim> load_k(base(f.k, f.k_stride, seq.k_row, head_kv()), f.k_stride.row, f.head_dim);
    const Loader<C.block_n, C.v_head_dim> load_v(base(f.v, f.v_stride, seq.k_row, head_kv()), f.v_stride.row, f.v_head_dim);
    const RowRange keys = band.keys();
    load_k.load(sK, first_key, keys);
    load_v.load(sV, first_key, keys);
  }

  __device__ __forceinline__ int head_kv() const { return C.head_split ? part / p.head_splits : part; }
  // The query heads that this block visits: those that read its KV head, or its part of them.
  __device__ __forceinline__ int heads() const { return C.head_split ? p.heads_per_split : p.fwd.heads_per_kv; }
  __device__ __forceinline__ int first_head() const { return part * heads(); }
  __device__ __forceinline__ int end_head() const { return (part + 1) * heads(); }

  // Starts to copy Q, dO, and LSE and delta of the next tile to a stage; nothing is left when all
  // heads are done.
  __device__ __forceinline__ void load_next(uint32_t stage) {
    if (ahead.head < end_head()) {
      const int first_row = ahead.m * C.block_m;
      load_q.load_from(q_ahead, stage, first_row, rows);
      load_o.load_from(dout_ahead, stage + TileQ::kBytes, first_row, p.dout == nullptr ? RowRange{0, 0, 0} : rows);
      if (kThreads == C.block_m || threadIdx.x < C.block_m) {
        const int row = first_row + static_cast<int>(threadIdx.x);
        ptx::cp_async_8(statistics_at(stage, threadIdx.x),
                        p.statistics + (rows.contains(row) ? RowStatistics::index(row_of_lse(ahead.head) + row) : RowStatistics::kNone));
      }
      const bool new_head = is_last(ahead);
      advance(ahead);
      if (new_head) {
        find_ahead();
      } else {
        q_ahead += kStep * C.block_m * load_q.row_stride;
        dout_ahead += kStep * C.block_m * load_o.row_stride;
      }
    }
    ptx::cp_async_commit();
  }
  // This thread's first chunks of the first tile of a head.
  __device__ __forceinline__ void find_ahead() {
    q_ahead = base(p.fwd.q, p.fwd.q_stride, seq.q_row + ahead.m * C.block_m + load_q.row, ahead.head) + load_q.col;
    dout_ahead = base(p.dout, p.dout_stride, seq.q_row + ahead.m * C.block_m + load_o.row, ahead.head) + load_o.col;
  }

  static __device__ __forceinline__ uint32_t statistics_at(uint32_t stage, int row) {
    return stage + TileQ::kBytes + TileO::kBytes + 8 * row;
  }
  __device__ __forceinline__ int64_t row_of_lse(int head) const {
    return batch * p.fwd.lse_batch_stride + head * p.fwd.lse_head_stride + seq.q_row;
  }

  // dQ of one tile, or some columns of it, before it is added; at first none.
  struct DqPart {
    typename ProductQ::Accumulator x;
    float* target;  // this warp's first tile of the sum
    int row, col;   // of that tile in the sequence

    __device__ __forceinline__ DqPart() : target(nullptr), row(kUnbounded), col(0) { ProductQ::clear(x); }
  };
  static constexpr int kFragments = ProductQ::kBlocks * ProductQ::kTiles;

  // dS K, columns `chunk` and up.
  template <class ReadDs>
  __device__ __forceinline__ void compute_dq(DqPart& part, const QueryTile& tile, ReadDs read_ds, uint32_t sK, int chunk) const {
    part.row = tile.m * C.block_m + ProductQ::row(), part.col = chunk + ProductQ::col();
    const DqSum<C.varlen> sum{p};
    part.target = sum.tile(seq, batch, tile.head, part.row) + part.col / sum.kCols * sum.kTile;
    const auto read_k = Operand<C.block_n, C.head_dim>::b_transposed(sK);
    ProductQ::clear(part.x);
    ProductQ::template multiply<C.block_n / 16>(part.x, read_ds, [&](uint32_t (&r)[4], int col, int k) { read_k(r, chunk + col, k); });
  }
  // Adds fragments [begin, end) of it atomically, each 16 x 8. Rows past the sequence have none.
  __device__ __forceinline__ void add_dq(const DqPart& part, int begin, int end) const {
    const int across = C.exact_head_dim ? C.head_dim / 8 : p.fwd.head_dim / 8;
#pragma unroll
    for (int i = begin; i < end; ++i) {
      const int b = i / ProductQ::kTiles, t = i % ProductQ::kTiles;
      if (part.row + 16 * b >= rows.end || (!C.exact_head_dim && part.col + 8 * t >= p.fwd.head_dim)) continue;
      ptx::add_global_fragment(part.target + (b * across + t) * 128, part.x[b][t]);
    }
  }

  // Deterministic, beside the products of a tile: passes the turn at the tile before, to which all
  // has been added, and looks for that at the next one. Each takes a microsecond of some warp,
  // which the others hide. Returns false in the one thread that has to wait_for_turn(), if it has.
  __device__ __forceinline__ bool take_turns(QueryTile& added, const QueryTile& tile) const {
    if constexpr (!C.deterministic) return true;
    if (added.head >= 0) pass_turn(added);
    added = tile;
    QueryTile coming = tile;
    advance(coming);
    return coming.head >= end_head() || threadIdx.x != kThreads - 1 || is_my_turn(coming);
  }
  // The barrier behind it makes what the blocks before this one have added known to all.
  __device__ __forceinline__ void wait_for_turn(const QueryTile& tile, bool ready) const {
    if constexpr (!C.deterministic) return;
    while (!ready) ready = is_my_turn(tile);
  }
  __device__ __forceinline__ bool is_my_turn(const QueryTile& tile) const {
    const DqTurns<C> turns{p};
    return turns.has(turns.number_of(seq, batch, tile.head, tile.m), turns.blocks_before(seq, tile.m, first_key / C.block_n));
  }
  // Lets the next block add, behind a barrier that all additions of this one come before.
  __device__ __forceinline__ void pass_turn(const QueryTile& tile) const {
    if constexpr (C.deterministic) {
      const DqTurns<C> turns{p};
      if (threadIdx.x == 0)
        turns.set(turns.number_of(seq, batch, tile.head, tile.m), turns.blocks_before(seq, tile.m, first_key / C.block_n) + 1);
    }
  }

  // dK and dV of this block's keys, or its part of them.
  template <class ProductK, class ProductV>
  __device__ __forceinline__ void store_dk_and_dv(const typename ProductK::Accumulator& rK,
                                                  const typename ProductV::Accumulator& rV) const {
    if constexpr (C.head_split) {
      store_part<ProductK>(rK, 0, p.fwd.head_dim);
      store_part<ProductV>(rV, p.fwd.head_dim, p.fwd.v_head_dim);
    } else {
      store<ProductK>(rK, p.dk, p.dk_stride, p.fwd.head_dim, p.softmax_scale);
      store<ProductV>(rV, p.dv, p.dv_stride, p.fwd.v_head_dim, C.dropout ? p.fwd.dropout_rescale : 1.f);
    }
  }

  // In float32 and not scaled, from column `first_col` of the parts on; tiles of 16 keys.
  template <class P>
  __device__ __forceinline__ void store_part(const typename P::Accumulator& x, int first_col, int cols) const {
    const KvParts<C.varlen> parts{p};
    // Else addresses are computed before the loop over queries, and kept in registers or spilled.
    int key = first_key + P::row(), number = part, sequence = batch;
    ptx::optimisation_barrier(key);
    ptx::optimisation_barrier(number);
    ptx::optimisation_barrier(sequence);
    const int across = parts.tiles_across();
    float* target = parts.tile(seq, sequence, number, key) + (first_col + P::col()) / parts.kCols * parts.kTile;
#pragma unroll
    for (int b = 0; b < P::kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < P::kTiles; ++t)
        if (key + 16 * b < seq.length_k && (C.exact_head_dim || P::col() + 8 * t < cols))
          ptx::store_global_fragment(target + (b * across + t) * parts.kTile, x[b][t]);
  }

  template <class P>
  __device__ __forceinline__ void store(const typename P::Accumulator& x, void* gradient, const Strides& stride, int cols,
                                        float scale) const {
    auto* out = static_cast<uint16_t*>(gradient) + seq.batch * stride.batch + seq.k_row * stride.row + head_kv() * stride.head;
    const int lane_first_key = first_key + P::row() + lane_row(), first_col = P::col();
#pragma unroll
    for (int b = 0; b < P::kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = lane_first_key + 16 * b + 8 * r;
        const bool owned = key < seq.length_k;
        uint16_t* row = out + key * stride.row;
        if constexpr (P::kTiles % 4 == 0) {
#pragma unroll
          for (int t = 0; t < P::kTiles; t += 4) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = Traits::pack(x[b][t + i][2 * r] * scale, x[b][t + i][2 * r + 1] * scale);
            transpose_quad(words);
            if (owned) store_quad<C>(row, first_col + 8 * t, cols, words);
          }
        } else {
#pragma unroll
          for (int t = 0; t < P::kTiles; ++t) {
            const uint32_t pair = Traits::pack(x[b][t][2 * r] * scale, x[b][t][2 * r + 1] * scale);
            if (owned) store_pair<C>(row, first_col + lane_col() + 8 * t, cols, pair);
          }
        }
      }
  }
};

}  // namespace fa
