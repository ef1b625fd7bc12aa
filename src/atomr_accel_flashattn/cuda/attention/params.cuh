// SPDX-License-Identifier: Apache-2.0
// Launch parameters: all run-time numbers of a kernel. kernels/forward.py and kernels/backward.py
// mirror these structs field by field; a test compares the offsets.
#pragma once

#include "ptx/types.cuh"

namespace fa {

// In elements; 64-bit, because batch x heads x length may exceed 2^31.
struct Strides {
  int64_t batch, row, head;
};

constexpr int32_t kUnbounded = 1 << 30;  // window_left / window_right without a bound

struct FwdParams {
  const void *q, *k, *v;
  void* o;
  float* lse;  // null: not wanted
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  const float *alibi_slopes, *learned_sink;
  const int64_t* rng;  // seed, offset
  Strides q_stride, k_stride, v_stride, o_stride;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t alibi_batch_stride;
  int32_t batch, heads, heads_per_kv, seqlen_q, seqlen_k, head_dim, v_head_dim;
  int32_t window_left, window_right, sink_tokens;
  int32_t blocks_m;
  int32_t section_heads;  // heads of an L2 swizzle group (scheduler.cuh)
  int32_t work_heads;     // heads the scheduler iterates over: of k and v if pack_gqa, else of q
  int32_t packed_shift;   // log2 of the query heads that are packed into rows
  int32_t dropout_threshold;
  float dropout_rescale;
  float scale_log2, softcap_scale, softcap_log2;
  // Polynomial softcap, for |s| up to the limit: s (scale_log2 + cubic s^2 + quintic s^4).
  float softcap_cubic, softcap_quintic, softcap_limit;
};

// The FA3 family reads q, k and v by TMA.
struct Fa3FwdParams {
  FwdParams fwd;
  int32_t* counters;  // persistent: tiles taken, blocks done; zero before and after every launch
  int32_t tiles;
  TensorMap q_map, k_map, v_map;
};

// Fa3FwdParams of fp8 tensors. A number is what is stored, times the factor of its group.
struct Fa3Fp8FwdParams {
  const float *q_descale, *k_descale, *v_descale;  // null: 1
  FwdParams fwd;
  // In elements; rows are blocks of 128 tokens. q has the factors of its KV heads.
  Strides q_descale_stride, k_descale_stride, v_descale_stride;
  int32_t* counters;
  int32_t tiles;
  TensorMap q_map, k_map, v_map;
};

struct RowStatistics;

// What the three kernels of a backward read: bwd_preprocess, fa2_bwd, bwd_postprocess.
struct BwdParams {
  const void* dout;           // null: zero
  const float* dlse;          // null: zero
  RowStatistics* statistics;  // workspace (row_statistics.cuh, dq_sum.cuh)
  float* dq_sum;
  int32_t* turns;  // deterministic (dq_turns.cuh)
  void *dq, *dk, *dv;
  float* dsink;
  FwdParams fwd;  // o and LSE are those of the forward
  Strides dout_stride, dq_stride, dk_stride, dv_stride;
  int64_t tokens_q, tokens_k;  // of all sequences, spare ones included
  int64_t dq_tile_rows;        // of a head in dq_sum: of a sequence, or of all packed ones
  int32_t heads_kv, blocks_n;
  int32_t section_pairs;                // (sequence, KV head) pairs that run side by side
  int32_t convert_blocks, sink_blocks;  // bwd_postprocess: blocks for dQ, blocks for dsink
  float softmax_scale;
  // Split over query heads (kv_parts.cuh): where in dq_sum the parts of dK and dV begin, tile rows
  // of one of a KV head, how many blocks share a tile of keys, and the query heads of each.
  int64_t kv_parts, kv_tile_rows;
  int32_t head_splits, heads_per_split;
};

// Denominator of a row over some keys: `sum` of 2^(score - max), in log2 units. The two stay apart,
// since an LSE in float32 loses the sum beside a huge maximum.
struct alignas(8) PartialSum {
  float max_log2, sum;
};

// Attention over a cache of K and V. In `fwd`, k and v are the cache: their batch stride is that of
// its blocks. A sequence has the slots from left_pad to its length, which counts the padding and
// not the new tokens, and those.
struct KvCacheParams {
  const int32_t* blocks;          // paged: (batch, blocks of one); else (batch), null: in order
  const int32_t* cache_lengths;   // (batch); null: cu_seqlens_k has them
  const int32_t* left_pad;        // (batch); null: 0
  const int32_t* cu_seqlens_new;  // null: new_tokens each
  // split: (splits, rows of the LSE, v_head_dim) and (splits, rows of the LSE)
  float* partial_o;
  PartialSum* partial_sum;
  int32_t* error;  // null, or raised to one more than the number of a sequence that does not fit
  FwdParams fwd;
  int64_t table_stride, lse_rows;
  int32_t block_size, num_blocks, capacity;  // capacity: slots that a sequence may have
  int32_t new_tokens;
  int32_t splits;
};

// The same in the blocks of a StepPlan (step_schedule.cuh), whose partial results are two a block:
// (2 blocks, block_m, width of v) and (2 blocks, block_m).
struct StepParams {
  void* schedule;
  KvCacheParams cache;
  int32_t blocks;      // of the attention, at most
  int32_t least_cost;  // of a part that shares its unit with others, in tiles
};

constexpr int kScaledTokens = 128;  // that share the factor of a block

// The same two where K and V, or all three, are fp8: an element is worth itself times a descale, 1
// where there are none. Steps of one: from a sequence to the next, or from a block of a paged cache
// (descales of tokens); from a block of 128 tokens, or from a slot; from a KV head.
struct DescaledKvCacheParams {
  const float *q_descale, *k_descale, *v_descale;
  KvCacheParams params;
  Strides q_descale_stride, k_descale_stride, v_descale_stride;
};
struct DescaledStepParams {
  const float *q_descale, *k_descale, *v_descale;
  StepParams params;
  Strides q_descale_stride, k_descale_stride, v_descale_stride;
};

// The same by the FA3 family, which reads q, k and v by TMA.
struct Fa3KvCacheParams : KvCacheParams {
  int32_t* counters;  // as in Fa3FwdParams
  int32_t tiles;      // of all splits
  int32_t box_rows;   // rows of a page that a box of K and V has
  TensorMap q_map, k_map, v_map;
};

// The same with fp8 q, k and v, whose factors have strides as those of Fa3Fp8FwdParams.
struct DescaleAddresses {
  const float *q_descale, *k_descale, *v_descale;
};
struct Fa3Fp8KvCacheParams : DescaleAddresses, KvCacheParams {
  Strides q_descale_stride, k_descale_stride, v_descale_stride;
  int32_t* counters;
  int32_t tiles;
  int32_t box_rows;
  TensorMap q_map, k_map, v_map;
};

// New tokens into a cache, and rotary embedding of them and of q on the way. The batch stride of
// the cache is that of its blocks.
struct KvAppendParams {
  const void *new_k, *new_v, *q;  // q null: nothing to rotate
  // Rows of cos and sin: (rotary_rows, rotary_dim / 2), contiguous; null: no rotation.
  const void *cos, *sin;
  const int32_t *blocks, *cache_lengths, *cu_seqlens_k, *cu_seqlens_new;  // as in KvCacheParams
  const int32_t* cu_seqlens_q;                                            // null: q is dense
  void *k, *v, *rotated_q;
  int32_t* error;  // as in KvCacheParams
  Strides new_k_stride, new_v_stride, q_stride, k_stride, v_stride, rotated_q_stride;
  int64_t table_stride;
  int32_t batch, heads, heads_kv, seqlen_q, seqlen_new, head_dim, v_head_dim;
  int32_t block_size, num_blocks, capacity;
  int32_t rotary_dim, rotary_rows;
  int32_t q_advances;  // query i has the position of new token i; else all that of the first
};

// The same into a cache of fp8, whose descales of tokens are written.
struct Fp8AppendParams {
  float *k_descale, *v_descale;  // null: 1
  const int32_t* left_pad;       // as in KvCacheParams
  KvAppendParams append;
  Strides k_descale_stride, v_descale_stride;  // as in DescaledKvCacheParams
};

// Two states of attention and where they go: o (batch, seqlen, heads, cols), LSE (batch, heads,
// seqlen), each with strides of its own.
struct MergeStatesParams {
  const void *o1, *o2;
  const float *lse1, *lse2;
  void* o;
  float* lse;
  Strides o1_stride, o2_stride, o_stride, lse1_stride, lse2_stride, lse_stride;
  int64_t o1_col, o2_col, o_col;  // from a column to the next
  int64_t rows;                   // of all heads
  int32_t seqlen, heads, cols;
  int32_t lanes;  // of a warp, that share a row: a power of two
};

struct DropoutMaskParams {
  uint8_t* keep;
  const int64_t* rng;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int32_t batch, heads, seqlen_q, seqlen_k;
  int32_t dropout_threshold;
};

}  // namespace fa
