// PTX leaves of sm_90a: mbarrier, tensor copies, wgmma, register reallocation. One instruction a function (PTX ISA 9.0).
#pragma once

#include "config.cuh"
#include "params.cuh"

namespace fa::ptx {

// mbarrier: a phase ends when `count` arrivals and all expected bytes have come.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// fence.proxy.async: shared memory written by ordinary stores is next read by wgmma or the copy engine.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// cp.async.bulk.tensor: a box of a 4-d tensor (column, row, head, batch); what lies outside the tensor arrives as zero.
__device__ __forceinline__ void tensor_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int row, int head, int batch,
                                            uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "%7;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch), "l"(cache_policy)
      : "memory");
}
// The same of a 5-d tensor (column, head of the group, row, group, batch).
__device__ __forceinline__ void tensor_load(uint32_t dst, const TensorMap* map, uint32_t barrier, int col, int member, int row, int group,
                                            int batch, uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], "
      "%8;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(col), "r"(member), "r"(row), "r"(group), "r"(batch), "l"(cache_policy)
      : "memory");
}
__device__ __forceinline__ void tensor_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// bar.sync and bar.arrive on a numbered barrier of `threads` threads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: registers move from the warpgroup that loads to those that compute.
template <int kRegisters>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// elect.sync: true in one lane of the warp, in a way that ptxas knows to be one lane.
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

// wgmma: asynchronous products of a warpgroup. fence orders register writes before them, commit closes a group, wait leaves `kPending` groups.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Nothing: a value that the compiler may not know.
__device__ __forceinline__ void conceal(int& x) { asm volatile("" : "+r"(x)); }
// Nothing: registers that an asynchronous product has written are read from here on, not before.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[t][e])::"memory");
}

// wgmma.mma_async m64nNk16: d (+)= a b. The two sizes that a kernel needs are written out for it (jit/wgmma.py).
//   keys(d, a, b, accumulate): a and b from shared memory, both with k contiguous: S = Q K^T
//   values(d, a, b): a from registers, b from shared memory with n contiguous: O += P V
template <int kN, DType kDType>
struct Wgmma;

}  // namespace fa::ptx
