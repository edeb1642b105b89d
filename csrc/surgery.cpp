// SPDX-License-Identifier: Apache-2.0
// Gradient surgery's ops on the CPU, and their Python bindings. The inner loops are in csrc/cpu; here are final sums, checks
// of indices and T x T arithmetic. The caller, minbert_fast/ops, has checked everything else.
#include "surgery.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "bindings.h"
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

// How Python passes a C++ argument: pointers as addresses (Tensor.data_ptr(); 0 is null),
// enumerations as integers, everything else unchanged.
template <class T, class = void>
struct FromPython {
  using Type = T;
  static T convert(T value) { return value; }
};
template <class T>
struct FromPython<T*> {
  using Type = uintptr_t;
  static T* convert(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <class T>
struct FromPython<T, std::enable_if_t<std::is_enum_v<T>>> {
  using Type = int;
  static T convert(int value) { return static_cast<T>(value); }
};

// Binds `function` as `name`; it runs without the interpreter's lock.
template <class Result, class... Arguments>
void bind(pybind11::module_& m, const char* name, Result (*function)(Arguments...)) {
  m.def(name, [function](typename FromPython<Arguments>::Type... arguments) {
    return function(FromPython<Arguments>::convert(arguments)...);
  }, Unlocked());
}

// Binds the struct as `name`, constructed from its members in their order.
template <class Struct, class... Members>
void bind_struct(pybind11::module_& m, const char* name) {
  pybind11::class_<Struct>(m, name).def(pybind11::init([](typename FromPython<Members>::Type... members) {
    return Struct{FromPython<Members>::convert(members)...};
  }));
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

void bind_surgery(pybind11::module_& m) {
  m.attr("max_tasks") = kMaxTasks;
  bind_struct<Where, int, void*, int>(m, "Where");
  bind_struct<Matrix, const void*, DType, int64_t, int64_t, int64_t>(m, "Matrix");
  bind_struct<AdamW, float*, float*, float*, const float*, bfloat16*, const int32_t*, double, double, double, double,
              double, bool, int64_t, int64_t>(m, "AdamW");
#define MINBERT_BIND(result, name, arguments) bind(m, #name, name);
  MINBERT_SURGERY_OPS(MINBERT_BIND)
#ifdef MINBERT_HAS_CUDA
#define MINBERT_BIND_CUDA(result, name, arguments) bind(m, "cuda_" #name, cuda::name);
  MINBERT_SURGERY_OPS(MINBERT_BIND_CUDA)
#endif
}

}  // namespace minbert
