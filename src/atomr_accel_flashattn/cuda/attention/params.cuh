// Launch parameters: every run-time number of a kernel. jit/params.py mirrors these structs field by field (a test compares the offsets).
#pragma once

#include "ptx/types.cuh"

namespace fa {

// Steps in elements; 64-bit, because batch x heads x length may pass 2^31.
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
  int32_t blocks_m, section_heads, work_heads;  // work_heads: that tiles are made for; those of k and v where their query heads are packed
  int32_t packed_shift;                         // log2 of the query heads that are packed into rows
  int32_t dropout_threshold;
  float dropout_rescale;
  float scale_log2, softcap_scale, softcap_log2;
  float softcap_cubic, softcap_quintic, softcap_limit;  // s (scale_log2 + cubic s^2 + quintic s^4) does for raw scores up to the limit
};

// The FA3 family reads q, k and v through tensor maps.
struct Fa3FwdParams {
  FwdParams fwd;
  int32_t* counters;  // persistent: tiles taken, blocks done; zero before and after every launch
  int32_t tiles;
  TensorMap q_map, k_map, v_map;
};

struct DropoutMaskParams {
  uint8_t* keep;
  const int64_t* rng;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int32_t batch, heads, seqlen_q, seqlen_k;
  int32_t dropout_threshold;
};

}  // namespace fa
