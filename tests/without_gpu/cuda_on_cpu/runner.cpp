// SPDX-License-Identifier: Apache-2.0
// A GPU. Each thread of a block is a fiber (ucontext), which runs until a barrier, a shuffle or its end;
// blocks run one after the other. This file is compiled without sanitizers, and tells them of fibers and barriers.
#include "cuda_runtime.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// A sanitizer that is loaded before this library replaces these.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
WEAK void* __tsan_create_fiber(unsigned) { return nullptr; }
WEAK void* __tsan_get_current_fiber() { return nullptr; }
WEAK void __tsan_switch_to_fiber(void*, unsigned) {}
WEAK void __tsan_acquire(void*) {}
WEAK void __tsan_release(void*) {}
}

Index threadIdx, blockIdx, blockDim, gridDim;

namespace gpu {
namespace {

constexpr std::size_t kStack = 256 << 10, kWarp = 32, kMostShared = 48 << 10;
enum State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> memory;
  const void* bottom;  // of the stack
  std::size_t size = kStack;
  void *fake_stack = nullptr, *tsan = nullptr;
  State state = kReady;
  int line = 0, lanes = 0;                // where it waits; a shuffle's distance
  std::uint64_t given = 0, received = 0;  // in a shuffle
};

std::mutex one_launch;
std::vector<Fiber> fibers;
Fiber host;
void (*kernel)(void*);
void* data;
std::vector<void*> arrays;  // in shared memory, of this block
std::size_t shared_bytes;
std::string failure;  // the first since the last cudaGetLastError
char barrier;         // its address is what ThreadSanitizer orders by

void fail(const char* what) {
  if (failure.empty()) failure = what;
}

void switch_fiber(Fiber& from, Fiber& to) {
  // AddressSanitizer's own swapcontext would forget what it knows of the stack's variables.
  static const auto swap = reinterpret_cast<int (*)(ucontext_t*, const ucontext_t*)>(
      dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
  __sanitizer_start_switch_fiber(from.state == kDone ? nullptr : &from.fake_stack, to.bottom, to.size);
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: no order follows
  swap(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

Fiber& wait(State state, int line) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state;
  self.line = line;
  switch_fiber(self, host);
  return self;
}

void start() {
  __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.size);
  kernel(data);
  wait(kDone, 0);
}

// For ThreadSanitizer: the host learns of all threads, then they of each other. Blocks share one place for their shared
// arrays, so they are ordered like launches.
void order() {
  for (int pass = 0; pass < 2; ++pass)
    for (const Fiber& fiber : fibers) {
      __tsan_switch_to_fiber(fiber.tsan, 0);
      __tsan_switch_to_fiber(host.tsan, 0);
    }
}

// Lets `count` threads go on, if all wait for the same thing in the same line.
bool release(Fiber* first, unsigned count) {
  if (std::any_of(first, first + count, [&](const Fiber& f) { return f.state != first->state || f.line != first->line; }))
    return false;
  const State state = first->state;
  for (unsigned i = 0; i < count; ++i) {
    if (state == kShuffle) first[i].received = first[i ^ first[i].lanes].given;
    first[i].state = kReady;
  }
  return true;
}

// Lets go those that wait for a shuffle, or else for the barrier. False when the block is done, or cannot go on.
bool proceed(unsigned block) {
  bool shuffled = false;
  for (unsigned i = 0; i < block; ++i)
    if (fibers[i].state == kShuffle) {
      shuffled = true;
      const unsigned first = i - i % kWarp;
      if (first + kWarp > block || !release(&fibers[first], kWarp))
        return fail("a shuffle without some lanes of its warp"), false;
    }
  if (shuffled) return true;
  const bool done = fibers[0].state == kDone;
  if (!release(fibers.data(), block)) return fail("a barrier that some threads of the block do not reach"), false;
  return !done;
}

void run_block(unsigned block, bool reversed) {
  order();
  arrays.clear();
  shared_bytes = 0;
  for (Fiber& fiber : fibers) {
    fiber.state = kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.memory.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, start, 0);
  }
  do {
    for (unsigned i = 0; i < block; ++i) {
      threadIdx.x = reversed ? block - 1 - i : i;
      if (fibers[threadIdx.x].state == kReady) switch_fiber(host, fibers[threadIdx.x]);
    }
  } while (proceed(block));
  if (shared_bytes > kMostShared) fail("more than 48 KB of shared memory");
}

}  // namespace

void run(unsigned grid, unsigned block, bool reversed, void (*body)(void*), void* arguments) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (grid == 0 || grid >= 1u << 31 || block == 0 || block > 1024) return fail("invalid configuration argument");
  kernel = body;
  data = arguments;
  gridDim.x = grid;
  blockDim.x = block;
  host.tsan = __tsan_get_current_fiber();
  while (fibers.size() < block) {
    Fiber& fiber = fibers.emplace_back();
    fiber.memory.reset(new char[kStack]);
    fiber.bottom = fiber.memory.get();
    fiber.tsan = __tsan_create_fiber(0);
  }
  for (unsigned i = 0; i < grid && failure.empty(); ++i) {
    blockIdx.x = reversed ? grid - 1 - i : i;
    run_block(block, reversed);
  }
  order();
  if (!failure.empty()) fibers.clear();  // some stopped midway
}

void shared(void* array, std::size_t bytes) {
  if (std::find(arrays.begin(), arrays.end(), array) != arrays.end()) return;
  arrays.push_back(array);
  shared_bytes += bytes;
  for (std::size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(array)[i] = -1;  // volatile: memset is watched
}

void bound(unsigned threads) {
  if (blockDim.x > threads) fail("more threads than __launch_bounds__ allows");
}

std::uint64_t exchange(unsigned mask, std::uint64_t bytes, int lanes, int line) {
  if (mask != 0xffffffffu) fail("a shuffle of other than all 32 lanes");
  fibers[threadIdx.x].given = bytes;
  fibers[threadIdx.x].lanes = lanes % kWarp;
  return wait(kShuffle, line).received;
}

}  // namespace gpu

void __syncthreads(int line) {
  __tsan_release(&gpu::barrier);
  gpu::wait(gpu::kBarrier, line);
  __tsan_acquire(&gpu::barrier);
}

extern "C" int processors = 1;  // few, so that small grids go round several times; a test may want more
cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = processors;
  return cudaSuccess;
}

thread_local std::string reported;
cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> lock(gpu::one_launch);
  reported.clear();
  reported.swap(gpu::failure);
  return reported.empty() ? cudaSuccess : 1;
}

const char* cudaGetErrorString(cudaError_t) { return reported.c_str(); }
