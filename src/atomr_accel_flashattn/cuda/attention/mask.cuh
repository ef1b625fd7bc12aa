// SPDX-License-Identifier: Apache-2.0
// Mask policy. Every mask is a band p - left <= j <= p + right (docs/semantics.md), from whose left
// bound sink tokens are exempt. The band owns both the range of K / V tiles to visit and the
// element test, so that the two cannot disagree.
#pragma once

#include "attention/config.cuh"
#include "attention/head_packing.cuh"
#include "tile/layout.cuh"

namespace fa {

// Tiles [begin, end).
struct TileRange {
  int begin, end;
};

// Rows [first, first + count) of Q as positions p among the keys, and the keys that they see.
template <Config C>
struct Band {
  int length_k, left, right, sinks;
  int p_first, p_last;  // positions of the first and last row; p_last < p_first if there is no row

  Band() = default;
  __device__ __forceinline__ Band(const FwdParams& p, const Sequence& seq, int first_row, int rows)
      : length_k(seq.length_k),
        left(p.window_left),
        right(p.window_right),
        sinks(C.sink_tokens ? p.sink_tokens : 0),
        // The lengths are subtracted first: two of them and a block of rows may exceed 2^31.
        p_first(query_of<C>(p, first_row) + (seq.length_k - seq.length_q)),
        p_last(query_of<C>(p, min(first_row + rows, row_count<C>(p, seq)) - 1) + (seq.length_k - seq.length_q)) {}

  // One past the last key that some row sees.
  __device__ __forceinline__ int key_end() const { return C.right_bound ? min(length_k, max(0, p_last + right + 1)) : length_k; }
  // First key that some row sees through its window; sink tokens may lie before it.
  __device__ __forceinline__ int key_begin() const { return C.left_bound ? min(max(0, p_first - left), key_end()) : 0; }

  __device__ __forceinline__ RowRange keys() const { return {key_begin(), key_end(), min(sinks, key_end())}; }

  __device__ __forceinline__ int tile_end() const { return (key_end() + C.block_n - 1) / C.block_n; }
  __device__ __forceinline__ int tile_begin() const { return key_begin() / C.block_n; }
  // Tiles of sink tokens below the window: 0 .. sink_tiles() - 1.
  __device__ __forceinline__ int sink_tiles() const { return before_window() + 1; }

  // Tiles are visited from the last to the first, then those of the sink tokens below the window.
  // -1 ends the loop.
  __device__ __forceinline__ int first_tile() const {
    const int last = tile_end() - 1;
    return last >= tile_begin() ? last : before_window();
  }
  __device__ __forceinline__ int next_tile(int n) const { return (!C.left_bound || n != tile_begin()) ? n - 1 : before_window(); }

  // Whether any of these rows sees any key of tile n.
  __device__ __forceinline__ bool sees(int n) const {
    const int j = n * C.block_n;
    bool seen = p_last >= p_first;
    if (C.right_bound) seen &= j <= p_last + right;
    if (C.left_bound) seen &= j + C.block_n > p_first - left || j < sinks;
    return seen;
  }
  // Whether some row does not see some key of tile n (of kKeys keys), so that elements need the
  // mask.
  template <int kKeys = C.block_n>
  __device__ __forceinline__ bool needs_mask(int n) const {
    const int j = n * kKeys;
    bool cut = j + kKeys > length_k;
    if (C.right_bound) cut |= j + kKeys - 1 > p_first + right;
    if (C.left_bound) cut |= j < p_last - left;
    return cut;
  }

  // The dual: which of these rows, counted from the first, see some of the keys [first_key,
  // first_key + count). It is one range, because the rows that see a sink token are the last ones.
  __device__ __forceinline__ RowRange queries(int first_key, int count) const {
    const int last_key = min(first_key + count, length_k) - 1;
    int first = p_first, last = p_last;
    if (C.right_bound) first = max(first, first_key - right);
    if (C.left_bound && first_key >= sinks) last = min(last, last_key + left);
    if (last < first || last_key < first_key) return {0, 0, 0};
    return {first - p_first, last - p_first + 1, 0};
  }
  // Those rows as tiles of block_m.
  __device__ __forceinline__ TileRange query_tiles(int first_key, int count) const {
    const RowRange rows = queries(first_key, count);
    return {rows.begin / C.block_m, (rows.end + C.block_m - 1) / C.block_m};
  }

  // Element test of a row at position p: masks(e) for key j0 + e, with a compile-time e.
  struct Row {
    int end, begin, sink;  // relative to j0
    __device__ __forceinline__ bool masks(int e) const {
      bool hidden = e >= end;
      if (C.left_bound) hidden |= e < begin && (!C.sink_tokens || e >= sink);
      return hidden;
    }
  };
  __device__ __forceinline__ Row row(int p, int j0) const {
    return {(C.right_bound ? min(length_k, p + right + 1) : length_k) - j0, p - left - j0, sinks - j0};
  }

  // The dual test, of a key j: masks(e) for the row at position p0 + e, with a compile-time e.
  struct Column {
    int begin, end;  // relative to p0
    __device__ __forceinline__ bool masks(int e) const { return (C.right_bound && e < begin) || e >= end; }
  };
  __device__ __forceinline__ Column column(int j, int p0) const {
    const bool unbounded = !C.left_bound || (C.sink_tokens && j < sinks);
    return {j - right - p0, j >= length_k ? -kUnbounded : unbounded ? kUnbounded : j + left + 1 - p0};
  }

 private:
  __device__ __forceinline__ int before_window() const {
    return C.sink_tokens ? min((min(sinks, key_end()) + C.block_n - 1) / C.block_n, tile_begin()) - 1 : -1;
  }
};

}  // namespace fa
