// SPDX-License-Identifier: Apache-2.0
// y = GELU(x + bias) = u Phi(u), the erf form (Hendrycks & Gimpel 2016), and the column sums that are bias gradients.
#include "cpu/column_sums.h"
#include "cpu/layer_kernels.h"

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

// For bf16 results, whose own rounding is a hundred times larger, 1/2 + u times a polynomial in u^2 will do: no power, no
// division. It holds for |u| <= 5, beyond which both functions are constant to 8e-6.
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

template <class T>
void forward(const BiasGelu& op, T* y, int threads) {
  const T* x = static_cast<const T*>(op.x);
  const Chunks chunks = row_chunks(op.rows);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    const float* bias = op.bias;  // a local that no store can change
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const T* from = x + row * op.width;
      T* to = y + row * op.width;
      for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
        const vfloat u = load(from + i, lanes) + load(bias + i, lanes);
        store(to + i, gelu<T>(u), lanes);
      });
    }
  });
}

template <class T>
void backward(const BiasGelu& op, const T* dy, const Segments& segments, T* dx, const TaskGradient& dbias, float* slots,
              int threads) {
  const T* x = static_cast<const T*>(op.x);
  const TaskSums sums(segments, op.rows, 1, op.width, slots);
  parallel_for(sums.chunks(), threads, [&](int64_t chunk) {
    const float* bias = op.bias;
    sums.for_tasks(chunk, [&](int64_t begin, int64_t end, float* slot) {
      for (int64_t row = begin; row < end; ++row) {
        const T *from = x + row * op.width, *cotangent = dy + row * op.width;
        T* to = dx + row * op.width;
        for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
          const vfloat u = load(from + i, lanes) + load(bias + i, lanes);
          const vfloat gradient = load(cotangent + i, lanes) * gelu_slope<T>(u);
          store(to + i, gradient, lanes);
          store(slot + i, load(slot + i) + gradient);
        });
      }
    });
    const int64_t first = sums.padding(chunk) * op.width, count = sums.end(chunk) * op.width - first;
    std::memset(dx + first, 0, static_cast<size_t>(count) * sizeof(T));
  });
  sums.finish(0, dbias, threads);
}

template <class T>
void add_rows(const ColumnSums& op, const Segments& segments, const TaskGradient& out, float* slots, int threads) {
  const T* x = static_cast<const T*>(op.x);
  const TaskSums sums(segments, op.rows, 1, op.width, slots);
  parallel_for(sums.chunks(), threads, [&](int64_t chunk) {
    sums.for_tasks(chunk, [&](int64_t begin, int64_t end, float* slot) {
      for (int64_t row = begin; row < end; ++row)
        for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
          store(slot + i, load(slot + i) + load(x + row * op.stride + i, lanes));
        });
    });
  });
  sums.finish(0, out, threads);
}

}  // namespace

void bias_gelu_rows(const BiasGelu& op, void* y, int threads) {
  if (op.dtype == DType::bf16)
    forward(op, static_cast<bfloat16*>(y), threads);
  else
    forward(op, static_cast<float*>(y), threads);
}

void bias_gelu_rows_backward(const BiasGelu& op, const void* dy, const Segments& segments, void* dx,
                             const TaskGradient& dbias, float* slots, int threads) {
  if (op.dtype == DType::bf16)
    backward(op, static_cast<const bfloat16*>(dy), segments, static_cast<bfloat16*>(dx), dbias, slots, threads);
  else
    backward(op, static_cast<const float*>(dy), segments, static_cast<float*>(dx), dbias, slots, threads);
}

void column_sums_rows(const ColumnSums& op, const Segments& segments, const TaskGradient& out, float* slots,
                      int threads) {
  if (op.dtype == DType::bf16)
    add_rows<bfloat16>(op, segments, out, slots, threads);
  else
    add_rows<float>(op, segments, out, slots, threads);
}

}  // namespace MINBERT_ISA
}  // namespace minbert
