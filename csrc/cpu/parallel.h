// SPDX-License-Identifier: Apache-2.0
// Parallel loops whose results do not depend on the number of threads.
//
// The problem alone decides the number and size of the chunks of work. Any thread may run any chunk, so each chunk writes
// its sums to a separate slot, and the slots are added afterwards in the order of the chunks.
// torch's wheels carry libgomp; imported after torch, this module shares that library, and so its pool of threads.
#pragma once

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "isa.h"

namespace minbert {

#if defined(MINBERT_PLAIN_THREADS)
// csrc/threads.cpp, for ThreadSanitizer: runs body(context, n) for n from 0 to count - 1, a thread each.
void on_plain_threads(int count, void (*body)(const void*, int), const void* context);
int plain_thread_number();
#endif

// The columns [begin, end) of each chunk of [0, total).
struct Chunks {
  int64_t total, size, count;

  // At most `most` chunks, each a multiple of `unit` long (but the last).
  Chunks(int64_t total_, int64_t unit, int64_t most) : total(total_) {
    const int64_t units = (total + unit - 1) / unit;
    size = (units + most - 1) / most * unit;
    if (size < unit) size = unit;
    count = (total + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < total ? (chunk + 1) * size : total; }
};

namespace MINBERT_ISA {

#if defined(MINBERT_PLAIN_THREADS)

inline int thread_number() { return plain_thread_number(); }

// Neighbouring chunks always fall to different threads, so that a race between them never hides.
template <class Body>
inline void parallel_for(int64_t count, int threads, const Body& body) {
  struct Loop {
    int64_t count;
    int threads;
    const Body& body;
  };
  const Loop loop{count, threads < count ? threads : static_cast<int>(count), body};
  on_plain_threads(loop.threads, [](const void* context, int number) {
    const Loop& work = *static_cast<const Loop*>(context);
    for (int64_t chunk = number; chunk < work.count; chunk += work.threads) work.body(chunk);
  }, &loop);
}

#else

// The number of the thread that runs a chunk, below the `threads` of its loop.
inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// body(chunk) for every chunk in [0, count), on at most `threads` threads. `body` must not throw.
template <class Body>
inline void parallel_for(int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && count > 1)
#else
  (void)threads;
#endif
  for (int64_t chunk = 0; chunk < count; ++chunk) body(chunk);
}

#endif

}  // namespace MINBERT_ISA
}  // namespace minbert
