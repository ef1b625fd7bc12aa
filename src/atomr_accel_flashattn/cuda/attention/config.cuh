// SPDX-License-Identifier: Apache-2.0
// Config, the one template parameter of a kernel. kernels/attention.py writes it from a KernelSpec
// with designated initialisers.
#pragma once

#include "ptx/types.cuh"

namespace fa {

// P V of a tile of keys: wgmma adds it to O; or it starts from 0, beside O or in the registers of
// S, and is added in float32.
enum class PvSum { InO, Beside, InScores };

struct Config {
  DType dtype;               // of q, and where nothing else is said of k, v and o
  int head_dim, v_head_dim;  // tile widths; the user's sizes may be smaller
  int block_m, block_n;      // rows of Q, rows of K and V
  int warps;
  int stages;           // buffers of K and of V
  bool exact_head_dim;  // the user's sizes equal the widths
  bool aligned;         // 16-byte loads are legal everywhere
  bool left_bound, right_bound, sink_tokens;
  bool alibi, softcap, scale_first;
  bool learned_sink, dropout, varlen;
  bool pack_gqa = false;       // FA3: the n query heads of a KV head share tiles (head_packing.cuh)
  bool ping_pong = false;      // FA3: ping-pong barriers between the warpgroups
  bool persistent = false;     // blocks compute several tiles: FA3 from a counter, FA2 by stride
  bool deterministic = false;  // backward: blocks add to dQ in the order of their keys
  bool head_split = false;     // backward: blocks share keys, each with some heads of the group
  bool any_ratio = false;      // with pack_gqa: the group is heads_per_kv heads, whatever its size
  bool paged = false;          // K and V lie in the pages of a table
  bool split = false;          // keys are split over blocks, whose partial results are combined
  bool scheduled = false;      // blocks have the parts of a schedule (step_schedule.cuh)
  // The bits of a row depend on nothing but the row and what it sees (docs/semantics.md).
  bool batch_invariant = false;
  bool plain_kv = false;  // of a kernel over a cache: K and V are dense or packed arrays instead

  bool block_descales = false;  // fp8: factors of blocks of tokens (block_descales.cuh)
  PvSum pv_sum = PvSum::InO;    // fp8: how P V of a tile of keys gets into O
  int pv_columns = 0;           // of O in one product, InScores
  // fp8: of ones behind those of V, 8 or none. Their products are the sums of P as it was rounded,
  // added up just as O is.
  int sum_columns = 0;
  // fp8: consumers take registers that the transposition of V would use.
  bool lean_producer = false;
  DType k_dtype = dtype, v_dtype = dtype, out_dtype = dtype;
  // fp8: each slot of a page has a descale of its own, else 128 tokens or more share one.
  bool k_token_scales = false, v_token_scales = false;
  bool fp8_products = false;  // mma.sync: Q and K of fp8 are multiplied in 8 bits, else in f16

  // Columns of O in registers.
  constexpr int o_width() const { return v_head_dim + sum_columns; }
  // Type of P as an operand of P V: that of v if q is fp8.
  constexpr DType p_dtype() const { return bytes_of(dtype) == 1 ? v_dtype : dtype; }
};

}  // namespace fa
