// SPDX-License-Identifier: Apache-2.0
// Threads for builds under ThreadSanitizer, which must compile the code that synchronises threads. It cannot follow
// libgomp: it would report a race between any two consecutive loops. In ordinary builds this file is empty.
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
