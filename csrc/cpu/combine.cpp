// SPDX-License-Identifier: Apache-2.0
// g = w J, J read once.
#include "cpu/combine.h"

namespace minbert {
namespace MINBERT_ISA {

// Larger results do not stay in a cache until they are read, so they are written past it.
constexpr int64_t kStreaming = int64_t{4} << 20;  // elements

void combine_rows(const Matrix& j, const float* w, float* out, int threads) {
  const Rows rows(j, w);
  const bool streaming = j.columns >= kStreaming && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const Chunks chunks(j.columns, 16 * kBlock, 1024);
  with_element(j.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(j.data);
    parallel_for(chunks.count, threads, [&](int64_t chunk) {
      alignas(64) float block[kBlock];
      for (int64_t column = chunks.begin(chunk); column < chunks.end(chunk); column += kBlock) {
        const int64_t left = chunks.end(chunk) - column;
        if (streaming && left >= kBlock) {
          combine_block(data, rows, column, kBlock, block);
          for (int64_t i = 0; i < kBlock; i += kLanes) store_streaming(out + column + i, load(block + i));
        } else {
          combine_block(data, rows, column, left < kBlock ? left : kBlock, out + column);
        }
      }
    });
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
