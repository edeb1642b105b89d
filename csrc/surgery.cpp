// SPDX-License-Identifier: Apache-2.0
// Gradient surgery's ops on the CPU. The inner loops are in csrc/cpu; here are final sums, checks
// of indices and T x T arithmetic. The caller, minbert_fast/ops, has checked everything else.
#include "surgery.h"

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "weights.h"

namespace minbert {
namespace {

void check_range(const int32_t* values, int64_t count, int64_t low, int64_t high, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < low || values[i] >= high)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(values[i]) + ", which is not in [" +
                                  std::to_string(low) + ", " + std::to_string(high) + ")");
}

}  // namespace

int64_t gram_workspace(const Where&, int64_t tasks, int64_t columns) {
  return gram_chunks(columns).count * (tasks * (tasks + 1) / 2) * static_cast<int64_t>(sizeof(double));
}

void gram(const Where& at, const Matrix& j, void* workspace, float* out, bool accumulate) {
  const int64_t tasks = j.rows, pairs = tasks * (tasks + 1) / 2, chunks = gram_chunks(j.columns).count;
  double* partials = static_cast<double*>(workspace);  // [chunks, pairs]
  call_gram_partials(j, partials, at.threads);
  int64_t pair = 0;
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t k = i; k < tasks; ++k, ++pair) {
      double total = accumulate ? out[i * tasks + k] : 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partials[chunk * pairs + pair];
      out[i * tasks + k] = out[k * tasks + i] = static_cast<float>(total);
    }
}

void combine(const Where& at, const Matrix& j, const float* w, float* out) { call_combine_rows(j, w, out, at.threads); }

void adamw(const Where& at, const Matrix& j, const float* w, const AdamW& to) {
  if (to.count == 0) return;
  if (to.row_slot) check_range(to.row_slot, to.count / to.width, -1, j.columns / to.width, "row_slot");
  const AdamWCoefficients a = adamw_coefficients(to);
  if (!a.skip) call_adamw_rows(j, w, to, a, at.threads);
}

void pcgrad_weights(const Where&, const float* gram, const int32_t* order, int tasks, bool mean, float* w,
                    int32_t* nonfinite) {
  check_range(order, static_cast<int64_t>(tasks) * tasks, 0, tasks, "order");
  double total[kMaxTasks] = {}, c[kMaxTasks];
  for (int task = 0; task < tasks; ++task) {
    pcgrad_project(gram, order + task * tasks, tasks, task, c);
    for (int k = 0; k < tasks; ++k) total[k] += c[k];
    nonfinite[task] = !task_is_finite(gram, tasks, task);
  }
  for (int k = 0; k < tasks; ++k) w[k] = static_cast<float>(mean ? total[k] / tasks : total[k]);
}

void clip_scale(const Where&, const float* gram, const float* w, int tasks, float max_norm, const float* extra,
                float* scalars, float* norm) {
  double square = extra ? *extra : 0;
  for (int task = 0; task < tasks; ++task) square += combined_square_part(gram, w, tasks, task);
  write_clip_scale(square, max_norm, scalars, norm);
}

}  // namespace minbert
