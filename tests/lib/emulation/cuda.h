// A CUDA block on a CPU: every thread of it is a fibre, and barriers and shuffles are where fibres change.
//
// It runs the kernels of csrc/cuda as they are written, without a GPU: their indices, bounds, sums and barriers are
// exercised, not their speed and not the hardware's arithmetic intrinsics. Blocks run one after the other. The order in
// which fibres run between two barriers is shuffled, and warps run ahead of others, so that a missing barrier shows in
// the numbers; fibres that wait for each other for ever end the program with a message. Dynamic shared memory starts as
// NaN in every block.
//
// Included before each source with -include (tests/lib/emulated.py); offers what csrc/cuda/common.cuh takes from CUDA.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStack = 96 * 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

struct Block {
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // what a thread offers in a shuffle
  Barrier all;
  unsigned alive = 0, current = 0;
  uint64_t progress = 0;  // barriers passed and threads ended
  ucontext_t scheduler;
  std::function<void()> kernel;
};
inline Block* block;
inline std::vector<unsigned char> dynamic_shared;

inline void yield() {
  swapcontext(&block->fibres[block->current]->context, &block->scheduler);
  threadIdx.x = block->current;
}

// Waits until `expected()` threads have come; the number may fall while threads end.
template <class Expected>
void wait(Barrier& barrier, const Expected& expected) {
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  while (barrier.generation == generation) {
    if (barrier.arrived >= expected()) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++block->progress;
    } else {
      yield();
    }
  }
}

inline void wait_for_warp(unsigned mask) {
  Barrier& barrier = block->warps[block->current / 32];
  wait(barrier, [mask] { return unsigned(std::popcount(mask)); });
}

template <class V>
V exchange(unsigned mask, V value, unsigned from_lane) {
  static_assert(sizeof(V) <= 8);
  std::memcpy(&block->slots[block->current], &value, sizeof value);
  wait_for_warp(mask);
  V other;
  std::memcpy(&other, &block->slots[block->current / 32 * 32 + from_lane], sizeof other);
  wait_for_warp(mask);
  return other;
}

inline void enter() {
  threadIdx.x = block->current;
  block->kernel();
  block->fibres[block->current]->done = true;
  --block->alive;
  ++block->progress;
  yield();
}

inline void run_block(unsigned threads, std::mt19937& order) {
  block->all = {};
  block->warps.assign((threads + 31) / 32, {});
  block->slots.assign((threads + 31) / 32 * 32, 0);
  block->alive = threads;
  while (block->fibres.size() < threads) block->fibres.push_back(std::make_unique<Fibre>());
  std::vector<unsigned> turns(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = *block->fibres[i];
    fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack = {fibre.stack.get(), 0, kStack};
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    turns[i] = i;
  }
  // Some warps rest until no other can go on, so that these run as far ahead as barriers let them.
  std::vector<bool> rests(block->warps.size(), false);
  bool all = true;
  while (block->alive > 0) {
    const uint64_t before = block->progress;
    std::shuffle(turns.begin(), turns.end(), order);
    for (unsigned turn : turns) {
      if (block->fibres[turn]->done || rests[turn / 32]) continue;
      block->current = turn;
      swapcontext(&block->scheduler, &block->fibres[turn]->context);
    }
    const bool stuck = block->progress == before;
    if (stuck && all) {
      std::fprintf(stderr, "emulation: threads of a block wait for each other at a barrier that some never reach\n");
      std::abort();
    }
    if (!stuck && !all) continue;
    all = stuck;
    for (size_t warp = 0; warp < rests.size(); ++warp) rests[warp] = !all && order() % 2 == 0;
  }
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::wait(emulation::block->all, [] { return emulation::block->alive; });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait_for_warp(mask); }
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lanes) {
  return emulation::exchange(mask, value, (threadIdx.x % 32) ^ unsigned(lanes));
}
template <class V>
V __shfl_sync(unsigned mask, V value, int lane) {
  return emulation::exchange(mask, value, unsigned(lane));
}
template <class V>
V __ldg(const V* from) {
  return *from;
}
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

#include "../../../csrc/cpu/number.h"

namespace megamm {

inline float inverse_sqrt(float x) { return 1 / std::sqrt(x); }
inline double inverse_sqrt(double x) { return 1 / std::sqrt(x); }

template <class C>
C* shared_memory() {
  return reinterpret_cast<C*>(emulation::dynamic_shared.data());
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const auto& /*on*/,
            Arguments... arguments) {
  static emulation::Block state;
  static std::mt19937 order(1);
  emulation::block = &state;
  state.kernel = [=] { kernel(arguments...); };
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  for (unsigned i = 0; i < unsigned(blocks); ++i) {
    blockIdx.x = i;
    emulation::dynamic_shared.assign(shared_bytes, 0xff);
    emulation::run_block(unsigned(threads), order);
  }
}

// Few, so that small tests too have blocks that go through several rows.
template <class... Parameters>
int64_t resident_blocks(void (*)(Parameters...), int, size_t, const auto&) {
  return 3;
}

}  // namespace megamm
