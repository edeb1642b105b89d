// SPDX-License-Identifier: Apache-2.0
// Threads for builds under ThreadSanitizer, which has to have compiled whatever makes threads wait for each other. libgomp
// is not such code: it would take every two loops that follow each other for a race. Ordinary builds leave this empty.
#include "cpu/parallel.h"

#if defined(MINBERT_PLAIN_THREADS)
#include <thread>
#include <vector>

namespace minbert {
namespace {
thread_local int current = 0;
}

int plain_thread_number() { return current; }

void on_plain_threads(int count, void (*body)(const void*, int), const void* context) {
  std::vector<std::thread> others;
  for (int number = 1; number < count; ++number)
    others.emplace_back([=] {
      current = number;
      body(context, number);
    });
  body(context, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace minbert
#endif
