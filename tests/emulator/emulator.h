// Runs a CUDA kernel of this project on the CPU, thread by thread: every thread is a fiber, a
// warp-wide instruction (mma, ldmatrix, shfl, vote) waits for its 32 lanes, __syncthreads waits for
// the block. All device asm lives in cuda/ptx/ and kernels/wgmma.py, so replacing those is enough.
//
// Things are made worse than on a GPU, on purpose. The order in which threads run is drawn from a
// seed, and tensor copies finish in an order drawn from it too: a missing barrier shows as a result
// that depends on the seed. cp.async writes, and wgmma reads and writes, either at once or as late
// as the PTX ISA allows (at the wait), also drawn from the seed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())

using std::max;
using std::min;

struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

namespace fa {
inline __align__(1024) unsigned char shared[228 * 1024];
}

namespace emulator {

struct Index {
  unsigned x;
};

struct Copy {
  uint32_t target;
  const void* source;  // null: zeros
  int bytes;
};

// wgmma of one thread: where its accumulators and A registers are, or the descriptors of operands
// in shared memory.
struct Product {
  float* d;
  const uint32_t* a_registers;  // null: A is in shared memory
  uint64_t a, b;
  bool accumulate, b_transposed;
  int n, element_bytes;
  float (*widen_a)(uint32_t);
  float (*widen_b)(uint32_t);
};

// mbarrier
struct Barrier {
  int count = 0, pending = 0, phase = 0;
  long bytes = 0;
  std::vector<unsigned> waiting;
};

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> groups;  // cp.async groups committed and not yet waited for
  std::vector<Copy> open;                 // issued since the last commit
  std::vector<std::vector<Product>> product_groups;
  std::vector<Product> open_products;
};

// Lanes that have reached a warp-wide instruction, or threads that have reached the block's
// barrier.
struct Rendezvous {
  std::vector<unsigned> waiting;
  void* operands[32];
};

// bar.sync waits, bar.arrive does not; both count. `threads`: how many all who come say that there
// are.
struct NamedBarrier {
  std::vector<unsigned> waiting;
  size_t arrived = 0, threads = 0;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Rendezvous> warps;
  Rendezvous barrier;
  std::map<int, NamedBarrier> named_barriers;
  std::map<int, std::vector<unsigned>> warpgroups;
  std::map<uint32_t, Barrier> mbarriers;
  std::vector<std::function<void()>> engine;  // tensor copies in flight
  std::vector<unsigned> runnable;
  unsigned current = 0, block = 0, grid = 0, alive = 0;
  bool late_copies = false;
  std::mt19937 random;
  jmp_buf scheduler;
  std::function<void()> body;
};

inline Machine* machine = nullptr;

inline Index thread_index() { return {machine->current}; }
inline Index block_index() { return {machine->block}; }
inline Index grid_size() { return {machine->grid}; }

// Gives the CPU to another thread; the caller is runnable again only once somebody puts it on the
// list.
inline void pause() {
  Thread& self = machine->threads[machine->current];
  if (_setjmp(self.resume) == 0) _longjmp(machine->scheduler, 1);
}

inline void wake(std::vector<unsigned>& waiting) {
  machine->runnable.insert(machine->runnable.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// The last of the 32 lanes executes the instruction for all.
template <class Instruction, class Operands>
void warp_wide(Operands& operands, Instruction execute) {
  const unsigned lane = machine->current % 32;
  Rendezvous& warp = machine->warps[machine->current / 32];
  warp.operands[lane] = &operands;
  warp.waiting.push_back(machine->current);
  if (warp.waiting.size() == 32) {
    Operands* all[32];
    for (int i = 0; i < 32; ++i) all[i] = static_cast<Operands*>(warp.operands[i]);
    execute(all);
    wake(warp.waiting);
  }
  pause();
}

// A thread comes to a named barrier of `threads`; those that wait go on when all have come.
inline void come(NamedBarrier& barrier, size_t threads) {
  if (barrier.arrived != 0 && barrier.threads != threads)
    throw std::runtime_error("named barrier: two uses of one number, of different size");
  barrier.threads = threads;
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  wake(barrier.waiting);
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  wake(barrier.waiting);
}

inline void finish_copies(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.source == nullptr) {
      std::memset(fa::shared + copy.target, 0, copy.bytes);
    } else {
      std::memcpy(fa::shared + copy.target, copy.source, copy.bytes);
    }
  }
  copies.clear();
}

inline void start_copy(uint32_t target, const void* source, int bytes = 16) {
  if (target % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0) throw std::runtime_error("cp.async: misaligned address");
  Thread& self = machine->threads[machine->current];
  self.open.push_back({target, source, bytes});
  if (!machine->late_copies) finish_copies(self.open);
}

inline void commit_copies() {
  Thread& self = machine->threads[machine->current];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

inline void wait_copies(size_t pending) {
  Thread& self = machine->threads[machine->current];
  while (self.groups.size() > pending) {
    finish_copies(self.groups.front());
    self.groups.erase(self.groups.begin());
  }
}

inline void thread_main() {
  machine->body();
  machine->threads[machine->current].done = true;
  --machine->alive;
  _longjmp(machine->scheduler, 1);
}

inline void run_thread(unsigned index) {
  Thread& thread = machine->threads[index];
  machine->current = index;
  if (_setjmp(machine->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = 256 * 1024;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, thread_main, 0);
  setcontext(&thread.start);
}

// Who waits for what, for the message of a deadlock.
inline std::string describe_waits() {
  std::string text = "deadlock;";
  for (const auto& [address, barrier] : machine->mbarriers) {
    if (barrier.waiting.empty()) continue;
    text += " mbarrier " + std::to_string(address) + " (phase " + std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) +
            " arrivals and " + std::to_string(barrier.bytes) + " bytes missing): " + std::to_string(barrier.waiting.size()) +
            " threads from " + std::to_string(barrier.waiting.front()) + ";";
  }
  for (size_t i = 0; i < machine->warps.size(); ++i) {
    const size_t lanes = machine->warps[i].waiting.size();
    if (lanes != 0) text += " warp " + std::to_string(i) + ": " + std::to_string(lanes) + " lanes at a warp-wide instruction;";
  }
  for (const auto& [first, waiting] : machine->warpgroups) {
    if (!waiting.empty()) text += " warpgroup of thread " + std::to_string(first) + ": " + std::to_string(waiting.size()) + " at wgmma;";
  }
  for (const auto& [id, barrier] : machine->named_barriers) {
    if (!barrier.waiting.empty())
      text += " named barrier " + std::to_string(id) + ": " + std::to_string(barrier.waiting.size()) + " threads;";
  }
  if (!machine->barrier.waiting.empty()) text += " block barrier: " + std::to_string(machine->barrier.waiting.size()) + ";";
  return text;
}

inline void run_block(unsigned block) {
  machine->block = block;
  // NaN in every format: nothing may be read before it is written.
  std::memset(fa::shared, 0xff, sizeof fa::shared);
  machine->alive = machine->threads.size();
  machine->runnable.clear();
  // A block may end with threads that have arrived at a barrier and none that waits.
  machine->named_barriers.clear();
  for (unsigned i = 0; i < machine->threads.size(); ++i) {
    Thread& thread = machine->threads[i];
    thread.started = thread.done = false;
    thread.groups.clear();
    thread.open.clear();
    thread.product_groups.clear();
    thread.open_products.clear();
    machine->runnable.push_back(i);
  }
  machine->mbarriers.clear();
  constexpr long kMostTurns = 100'000'000;  // a minute: a block of the tests takes a few million
  for (long turns = 0; !machine->runnable.empty() || !machine->engine.empty(); ++turns) {
    if (turns == kMostTurns) throw std::runtime_error("the block never ends; " + describe_waits());
    const size_t choices = machine->runnable.size() + machine->engine.size(), choice = machine->random() % choices;
    if (choice >= machine->runnable.size()) {
      std::swap(machine->engine[choice - machine->runnable.size()], machine->engine.back());
      const auto copy = std::move(machine->engine.back());
      machine->engine.pop_back();
      copy();
      continue;
    }
    std::swap(machine->runnable[choice], machine->runnable.back());
    const unsigned next = machine->runnable.back();
    machine->runnable.pop_back();
    run_thread(next);
  }
  if (machine->alive != 0) throw std::runtime_error(describe_waits());
}

// 0, or 1 with the reason in `message`.
inline int launch(unsigned grid, unsigned threads, unsigned seed, char* message, size_t size, std::function<void()> body) {
  Machine state;
  state.threads = std::vector<Thread>(threads);
  for (Thread& thread : state.threads) thread.stack = std::make_unique<char[]>(256 * 1024);
  state.warps.resize(threads / 32);
  state.random.seed(seed);
  state.late_copies = seed % 2 == 1;
  state.body = std::move(body);
  state.grid = grid;
  machine = &state;
  try {
    for (unsigned block = 0; block < grid; ++block) run_block(block);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), size - 1);
    return 1;
  }
  return 0;
}

}  // namespace emulator

inline void __threadfence() {}
inline void __syncthreads() {
  using emulator::machine;
  machine->barrier.waiting.push_back(machine->current);
  if (machine->barrier.waiting.size() == machine->alive) emulator::wake(machine->barrier.waiting);
  emulator::pause();
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  struct Operands {
    T in, out;
  } mine = {x, x};
  emulator::warp_wide(mine, [mask](Operands** all) {
    for (int i = 0; i < 32; ++i) all[i]->out = all[i ^ mask]->in;
  });
  return mine.out;
}

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  struct Operands {
    T in, out;
    int from;
  } mine = {x, x, from & 31};
  emulator::warp_wide(mine, [](Operands** all) {
    for (int i = 0; i < 32; ++i) all[i]->out = all[all[i]->from]->in;
  });
  return mine.out;
}

inline unsigned __ballot_sync(unsigned, bool x) {
  struct Operands {
    bool in;
    unsigned out;
  } mine = {x, 0};
  emulator::warp_wide(mine, [](Operands** all) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned{all[i]->in} << i;
    for (int i = 0; i < 32; ++i) all[i]->out = bits;
  });
  return mine.out;
}

inline void __syncwarp() { __shfl_sync(0xffffffffu, 0, 0); }

inline int atomicAdd(int* address, int x) {
  const int old = *address;
  *address += x;
  return old;
}

inline int atomicMax(int* address, int x) {
  const int old = *address;
  *address = old > x ? old : x;
  return old;
}

inline bool __any_sync(unsigned, bool x) {
  struct Operands {
    bool in, out;
  } mine = {x, x};
  emulator::warp_wide(mine, [](Operands** all) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= all[i]->in;
    for (int i = 0; i < 32; ++i) all[i]->out = any;
  });
  return mine.out;
}
