// SPDX-License-Identifier: Apache-2.0
// Sums over the rows of each task, in an order that does not depend on the number of threads.
//
// Rows are divided into chunks. The rows of both chunk c and task t form a piece, whose sums go to slot c + t. There are at
// most chunks + tasks - 1 pieces, and no two have the same slot. The slots of each task are then added in order.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace minbert {

// Token-row bounds of the tasks: task t owns rows bounds[t] to bounds[t + 1]; rows from bounds[T] on are padding.
struct Segments {
  const int32_t* bounds;
  int64_t tasks;
};

// Every task's gradient of one parameter [T, ...], `stride` elements from task to task. Null data: not wanted.
struct TaskGradient {
  void* data;
  DType dtype;  // f32 or bf16
  int64_t stride;
};

inline Chunks row_chunks(int64_t rows) { return {rows, 16, 128}; }

// Floats in all slots, for `sums` sums of `width` columns each.
inline int64_t slot_floats(int64_t rows, int64_t tasks, int64_t sums, int64_t width) {
  return (row_chunks(rows).count + tasks) * sums * ((width + 15) / 16 * 16);
}

namespace MINBERT_ISA {

// body(row) for every row, by chunks.
template <class Body>
inline void for_rows(int64_t rows, int threads, const Body& body) {
  const Chunks chunks = row_chunks(rows);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) body(row);
  });
}

class TaskSums {
 public:
  TaskSums(const Segments& segments, int64_t rows, int64_t sums, int64_t width, float* slots)
      : segments_(segments), chunks_(row_chunks(rows)), sums_(sums), width_(width), pitch_(round_up(width, 16)),
        slots_(slots) {}

  // body(row, slot) for every row of every task. The body adds to the sums of the row's piece, slot [sums, pitch].
  template <class Body>
  void for_rows(int threads, const Body& body) const {
    parallel_for(chunks_.count, threads, [&](int64_t chunk) {
      for (int64_t task = 0; task < segments_.tasks; ++task) {
        const int64_t low = segments_.bounds[task], high = segments_.bounds[task + 1];
        const int64_t begin = chunks_.begin(chunk) > low ? chunks_.begin(chunk) : low;
        const int64_t end = chunks_.end(chunk) < high ? chunks_.end(chunk) : high;
        if (begin >= end) continue;
        float* slot = slots_ + (chunk + task) * sums_ * pitch_;
        std::memset(slot, 0, static_cast<size_t>(sums_ * pitch_) * sizeof(float));
        for (int64_t row = begin; row < end; ++row) body(row, slot);
      }
    });
  }

  // Writes zeros to the rows of `matrix` [rows, width] that belong to no task.
  template <class T>
  void clear_padding(T* matrix) const {
    const int64_t first = segments_.bounds[segments_.tasks] * width_, end = chunks_.total * width_;
    std::memset(matrix + first, 0, static_cast<size_t>(end - first) * sizeof(T));
  }

  // out[t] = sum number `sum` over all rows of task t; zeros for a task without rows.
  void finish(int64_t sum, const TaskGradient& out, int threads) const {
    if (!out.data) return;
    const Chunks columns(width_, 256, 64);
    parallel_for(segments_.tasks * columns.count, threads, [&](int64_t item) {
      const int64_t task = item / columns.count, part = item % columns.count;
      const int64_t begin = columns.begin(part), count = columns.end(part) - begin;
      with_element(out.dtype, [&](auto element) {
        add_slots(sum, task, begin, count, static_cast<decltype(element)*>(out.data) + task * out.stride + begin);
      });
    });
  }

  int64_t pitch() const { return pitch_; }

 private:
  template <class T>
  void add_slots(int64_t sum, int64_t task, int64_t begin, int64_t count, T* out) const {
    const int64_t first_row = segments_.bounds[task], last_row = segments_.bounds[task + 1] - 1;
    const int64_t first = first_row / chunks_.size, last = last_row / chunks_.size;
    const float* slots = slots_ + sum * pitch_ + begin;
    for_columns(count, [&](int64_t i, auto lanes, int) {
      vfloat total{};
      if (first_row <= last_row)
        for (int64_t chunk = first; chunk <= last; ++chunk)
          total += load(slots + (chunk + task) * sums_ * pitch_ + i, lanes);
      store(out + i, total, lanes);
    });
  }

  const Segments segments_;
  const Chunks chunks_;
  const int64_t sums_, width_, pitch_;
  float* const slots_;
};

}  // namespace MINBERT_ISA
}  // namespace minbert
