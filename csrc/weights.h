// SPDX-License-Identifier: Apache-2.0
// The T x T arithmetic of gradient surgery, written once for the CPU and for CUDA.
//
// PCGrad (Yu et al. 2020, arXiv:2001.06782) starts from each task's gradient g_i and, for the other tasks j in a given
// order, subtracts its part along g_j whenever the two conflict (their inner product is negative). The projected gradient
// is a combination c J of the rows of J, with c = e_i at first. Its product with g_j is (c G)_j, and a projection changes
// c_j alone.
#pragma once

#include "surgery.h"

namespace minbert {

// A task's gradient holds NaN or infinity, or its squared norm overflows fp32.
MINBERT_HD inline bool task_is_finite(const float* gram, int tasks, int task) {
  const float square = gram[task * tasks + task];
  return square - square == 0;
}

// Writes c [T], the coefficients of task `task` after its projections in the order `order` [T]. The task itself and
// indices out of range are skipped. So are tasks that are not finite, and their own c is zero.
MINBERT_HD inline void pcgrad_project(const float* gram, const int32_t* order, int tasks, int task, double* c) {
  for (int k = 0; k < tasks; ++k) c[k] = 0;
  if (!task_is_finite(gram, tasks, task)) return;
  c[task] = 1;
  for (int step = 0; step < tasks; ++step) {
    const int other = order[step];
    if (other == task || other < 0 || other >= tasks || !task_is_finite(gram, tasks, other)) continue;
    double product = 0;
    for (int k = 0; k < tasks; ++k)
      if (c[k] != 0) product += c[k] * gram[k * tasks + other];
    const double square = gram[other * tasks + other];
    if (product < 0 && square > 0) c[other] -= product / square;
  }
}

// Task i's part w_i (G w)_i of |w J|^2 = w G w. Rows of weight zero are ignored, even if not finite.
MINBERT_HD inline double combined_square_part(const float* gram, const float* w, int tasks, int i) {
  double part = 0;
  if (w[i] != 0)
    for (int k = 0; k < tasks; ++k)
      if (w[k] != 0) part += static_cast<double>(w[i]) * w[k] * gram[i * tasks + k];
  return part;
}

// From a gradient's squared norm: the norm, the scale that brings it down to max_norm (0: no bound), and whether to skip
// the step because the norm is not finite.
MINBERT_HD inline void write_clip_scale(double square, float max_norm, float* scalars, float* norm) {
  const double length = sqrt(square < 0 ? 0 : square);  // rounding may leave a small negative number; NaN stays
  const double scale = max_norm / (length + 1e-6);
  const bool finite = length - length == 0;
  *norm = static_cast<float>(length);
  scalars[kGradientScale] = finite && max_norm > 0 && scale < 1 ? static_cast<float>(scale) : 1.0f;
  scalars[kSkip] = finite ? 0.0f : 1.0f;
}

}  // namespace minbert
