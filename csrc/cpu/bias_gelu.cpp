// SPDX-License-Identifier: Apache-2.0
// y = GELU(x + bias) = u Phi(u), the erf form (Hendrycks & Gimpel 2016).
#include "cpu/bias_gelu.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

struct Normal {
  vfloat cumulative, density;
};

// The standard normal distribution at u, cumulative to an absolute error of 6e-8. The tail is density(u) sqrt(2 pi) m(|u|)
// with Mills' ratio m, a polynomial in t = 1 / (1 + |u| / 4); its coefficients minimise the largest error of u Phi(u).
inline Normal normal(vfloat u) {
  const vfloat bell = exp2(u * u * -0.7213475204444817f);  // e^(-u^2 / 2)
  const vfloat size = larger(u, -u);
  const vfloat t = 1.0f / (1.0f + 0.25f * size);
  const vfloat ratio = polynomial(t, 0.09897878645565564f, 0.11043259964456846f, 0.032229530721946335f,
                                  0.2654266962541932f, -0.2490083963809379f, 0.3310103813723524f,
                                  -0.08906956934034478f);
  const vfloat tail = ratio * t * bell;
  return {u < 0.0f ? tail : 1.0f - tail, bell * 0.3989422804014327f};
}

// bf16 results have a rounding error a hundred times larger. For them 1/2 + u times a polynomial in u^2 is enough, without
// a power or a division. It holds for |u| <= 5; beyond, both functions are constant to 8e-6.
constexpr float kFlat = 5.0f;

inline vfloat flattened(vfloat u) { return smaller(broadcast(kFlat), larger(broadcast(-kFlat), u)); }

// GELU(u) = u Phi(u).
template <class T>
inline vfloat gelu(vfloat u) {
  if constexpr (sizeof(T) == sizeof(float)) return u * normal(u).cumulative;
  const vfloat c = flattened(u), v = c * c * (2 / (kFlat * kFlat)) - 1.0f;
  const vfloat cumulative =
      0.5f + c * polynomial(v, 0.141363731f, -0.0702983202f, 0.0515268f, -0.0403910479f, 0.0313393122f, -0.0236218939f,
                            0.0169817583f, -0.0102018075f, 0.00499800165f, -0.0038089169f, 0.00325722638f,
                            -0.00114497172f);
  return u < -kFlat ? vfloat{} : u * cumulative;
}

// Its derivative, Phi(u) + u phi(u).
template <class T>
inline vfloat gelu_slope(vfloat u) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const Normal n = normal(u);
    return n.cumulative + u * n.density;
  }
  const vfloat c = flattened(u), v = c * c * (2 / (kFlat * kFlat)) - 1.0f;
  return 0.5f + c * polynomial(v, 0.142133657f, -0.0750997902f, 0.0665815358f, -0.0720791129f, 0.0802138069f,
                               -0.0819138686f, 0.0806352799f, -0.0773051404f, 0.0513889706f, -0.0178737468f,
                               0.0177256719f, -0.024661509f, 0.0102562531f);
}

}  // namespace

void bias_gelu_forward(const BiasGelu& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(op.rows, threads, [&](int64_t row) {
      const float* bias = op.bias;  // a local that no store can change
      const T* from = static_cast<const T*>(op.x) + row * op.width;
      T* to = static_cast<T*>(op.y) + row * op.width;
      for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
        const vfloat u = load(from + i, lanes) + load(bias + i, lanes);
        store(to + i, gelu<T>(u), lanes);
      });
    });
  });
}

void bias_gelu_backward(const BiasGelu& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const TaskSums sums(op.segments, op.rows, 1, op.width, op.slots);
    sums.for_rows(threads, [&](int64_t row, float* slot) {
      const int64_t at = row * op.width;
      const float* bias = op.bias;  // a local that no store can change
      const T *from = static_cast<const T*>(op.x) + at, *cotangent = static_cast<const T*>(op.dy) + at;
      T* to = static_cast<T*>(op.dx) + at;
      for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
        const vfloat u = load(from + i, lanes) + load(bias + i, lanes);
        const vfloat gradient = load(cotangent + i, lanes) * gelu_slope<T>(u);
        store(to + i, gradient, lanes);
        store(slot + i, load(slot + i) + gradient);
      });
    });
    sums.clear_padding(static_cast<T*>(op.dx));
    sums.finish(0, op.dbias, threads);
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
