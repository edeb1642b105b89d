// SPDX-License-Identifier: Apache-2.0
// LayerNorm of one row of floats in the first-level cache, and its gradient (Ba et al. 2016).
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace minbert {

constexpr int64_t kMaxWidth = 8192;  // of a row

namespace MINBERT_ISA {

struct Statistics {
  float mean, rstd;
};

// z [width], of which `total` is the sum.
inline Statistics statistics(const float* z, int64_t width, float total, float eps) {
  const float mean = total / static_cast<float>(width);
  Sum squares;
  for_columns(width, [&](int64_t i, auto lanes, int slot) {
    const vfloat centred = keep_lanes(load(z + i, lanes) - mean, lanes, 0);
    squares.add(slot, centred * centred);
  });
  return {mean, 1.0f / std::sqrt(squares.total() / static_cast<float>(width) + eps)};
}

// The numbers that the gradient's second pass takes from the first:
// dz = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy gamma.
struct NormGradient {
  float rstd, shift, along;

  vfloat operator()(vfloat g, vfloat xhat) const { return (g - shift - xhat * along) * rstd; }
};

// First pass: fills xhat [width] from z = sum_before(i, lanes), adds to dgamma and dbeta.
template <class T, class Before>
inline __attribute__((always_inline)) NormGradient norm_gradient(int64_t width, Statistics s, const float* gamma,
                                                                 const Before& sum_before, const T& cotangent,
                                                                 float* xhat, float* dgamma, float* dbeta) {
  // A row of one column equals its mean. The difference is a rounding error, which rstd would enlarge.
  if (width == 1) s.rstd = 0;
  Sum shift, along;
  for_columns(width, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
    const vfloat x = keep_lanes((sum_before(i, lanes) - s.mean) * s.rstd, lanes, 0);
    const vfloat dy = cotangent(i, lanes), g = dy * load(gamma + i, lanes);
    store(xhat + i, x);
    store(dgamma + i, load(dgamma + i) + dy * x);
    store(dbeta + i, load(dbeta + i) + dy);
    shift.add(slot, g);
    along.add(slot, g * x);
  });
  const float n = static_cast<float>(width);
  return {s.rstd, shift.total() / n, along.total() / n};
}

}  // namespace MINBERT_ISA
}  // namespace minbert
