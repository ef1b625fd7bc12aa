// SPDX-License-Identifier: Apache-2.0
// TMA, the tensor memory accelerator, sm_90 (PTX ISA, "cp.async.bulk.tensor").
#pragma once

#include "ptx/types.cuh"

namespace fa::ptx {

// elect.sync: true in one lane of the warp, which ptxas then knows to be a single lane.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, one;\n"
      "}\n"
      : "=r"(elected));
  return elected;
}

// Proxy fence: orders st.shared before reads of shared memory by wgmma or TMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Loads a box of a 4-d tensor (column, row, head, batch); what lies outside the tensor is
// zero-filled.
__device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int row, int head, int batch,
                                         uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "%7;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch), "l"(cache_policy)
      : "memory");
}
// The same from a 5-d tensor (column, head of the group, row, group, batch).
__device__ __forceinline__ void tma_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int member, int row, int group,
                                         int batch, uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], "
      "%8;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(col), "r"(member), "r"(row), "r"(group), "r"(batch), "l"(cache_policy)
      : "memory");
}
__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

}  // namespace fa::ptx
