// SPDX-License-Identifier: Apache-2.0
// Gradient surgery on the CPU: scratch memory, fixed-order sums and the T x T arithmetic around the inner loops.
#include "surgery.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "surgery_weights.h"

namespace minbert {
namespace {

void check_range(const int32_t* values, int64_t count, int64_t low, int64_t high, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < low || values[i] >= high)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(values[i]) + ", which is not in [" +
                                  std::to_string(low) + ", " + std::to_string(high) + ")");
}

}  // namespace

void gram(const Matrix& j, float* out, bool accumulate, int threads) {
  const int64_t tasks = j.rows, pairs = tasks * (tasks + 1) / 2, chunks = gram_chunks(j.columns).count;
  std::vector<double> partials(static_cast<size_t>(chunks * pairs));
  call_gram_partials(j, partials.data(), threads);
  int64_t pair = 0;
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t k = i; k < tasks; ++k, ++pair) {
      double total = accumulate ? out[i * tasks + k] : 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partials[static_cast<size_t>(chunk * pairs + pair)];
      out[i * tasks + k] = out[k * tasks + i] = static_cast<float>(total);
    }
}

void combine(const Matrix& j, const float* w, float* out, int threads) { call_combine_rows(j, w, out, threads); }

void adamw(const Matrix& j, const float* w, const Parameters& p, const AdamWOptions& o, const float* scalars,
           int threads) {
  const AdamWCoefficients a = adamw_coefficients(o, scalars);
  if (!a.skip) call_adamw_dense(j, w, p, a, threads);
}

void adamw_rows(const Matrix& j, const float* w, const int32_t* row_slot, int64_t width, const Parameters& p,
                const AdamWOptions& o, const float* scalars, int threads) {
  if (p.count == 0) return;
  check_range(row_slot, p.count / width, -1, j.columns / width, "row_slot");
  const AdamWCoefficients a = adamw_coefficients(o, scalars);
  if (!a.skip) call_adamw_sparse(j, w, row_slot, width, p, a, threads);
}

void pcgrad_weights(const float* gram, const int32_t* order, int tasks, bool mean, float* w, int32_t* nonfinite) {
  check_range(order, static_cast<int64_t>(tasks) * tasks, 0, tasks, "order");
  double total[kMaxTasks] = {}, c[kMaxTasks];
  for (int task = 0; task < tasks; ++task) {
    pcgrad_project(gram, order + task * tasks, tasks, task, c);
    for (int k = 0; k < tasks; ++k) total[k] += c[k];
    nonfinite[task] = !task_is_finite(gram, tasks, task);
  }
  for (int k = 0; k < tasks; ++k) w[k] = static_cast<float>(mean ? total[k] / tasks : total[k]);
}

void clip_scale(const float* gram, const float* w, int tasks, const float* extra, float max_norm, float* scalars,
                float* norm) {
  double square = extra ? *extra : 0;
  for (int task = 0; task < tasks; ++task) square += combined_square_part(gram, w, tasks, task);
  write_clip_scale(square, max_norm, scalars, norm);
}

}  // namespace minbert
