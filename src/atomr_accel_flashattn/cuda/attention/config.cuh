// The one template parameter of a kernel. Python's KernelSpec writes it with designated initialisers (jit/source.py).
#pragma once

#include "ptx/types.cuh"

namespace fa {

struct Config {
  DType dtype;
  int head_dim, v_head_dim;  // tile widths; the user's sizes may be smaller
  int block_m, block_n;      // rows of Q, rows of K and V
  int warps;
  int stages;           // buffers of K and of V
  bool exact_head_dim;  // the user's sizes equal the widths
  bool aligned;         // 16-byte loads are legal everywhere
  bool left_bound, right_bound, sink_tokens;
  bool alibi, softcap, prescale;
  bool learned_sink, dropout, varlen;
  bool pack_gqa = false;    // FA3: row r of Q is query r / n of head r % n, of the n heads that share K and V
  bool ping_pong = false;   // FA3: warpgroups issue their products in turn
  bool persistent = false;  // blocks take tile after tile: FA3 from a counter, FA2 in turn
};

}  // namespace fa
