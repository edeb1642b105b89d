// SPDX-License-Identifier: Apache-2.0
// Gradient surgery as Python sees it. minbert_fast/native/surgery.py is the only caller, and has checked everything.
#include "bindings.h"
#include "surgery.h"

namespace py = pybind11;

namespace minbert {
namespace {

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

Matrix matrix(Address data, int dtype, int64_t rows, int64_t columns, int64_t stride) {
  return {pointer<void>(data), static_cast<DType>(dtype), rows, columns, stride};
}

Parameters parameters(Address p, Address m, Address v, Address copy, int64_t count) {
  return {pointer<float>(p), pointer<float>(m), pointer<float>(v), pointer<bfloat16>(copy), count};
}

AdamWOptions options(double lr_factor, double beta1, double beta2, double eps, double weight_decay, bool correct_bias,
                     bool torch_style) {
  return {lr_factor, beta1, beta2, eps, weight_decay, correct_bias, torch_style};
}

void bind_cpu(py::module_& m) {
  m.def("gram", [](const Matrix& j, Address out, bool accumulate, int threads) {
    gram(j, pointer<float>(out), accumulate, threads);
  }, Unlocked());
  m.def("combine", [](const Matrix& j, Address w, Address out, int threads) {
    combine(j, pointer<float>(w), pointer<float>(out), threads);
  }, Unlocked());
  m.def("adamw", [](const Matrix& j, Address w, const Parameters& p, const AdamWOptions& o, Address scalars,
                    int threads) {
    adamw(j, pointer<float>(w), p, o, pointer<float>(scalars), threads);
  }, Unlocked());
  m.def("adamw_rows", [](const Matrix& j, Address w, Address row_slot, int64_t width, const Parameters& p,
                         const AdamWOptions& o, Address scalars, int threads) {
    adamw_rows(j, pointer<float>(w), pointer<int32_t>(row_slot), width, p, o, pointer<float>(scalars), threads);
  }, Unlocked());
  m.def("pcgrad_weights", [](Address gram, Address order, int tasks, bool mean, Address w, Address nonfinite) {
    pcgrad_weights(pointer<float>(gram), pointer<int32_t>(order), tasks, mean, pointer<float>(w),
                   pointer<int32_t>(nonfinite));
  }, Unlocked());
  m.def("clip_scale", [](Address gram, Address w, int tasks, Address extra, float max_norm, Address scalars,
                         Address norm) {
    clip_scale(pointer<float>(gram), pointer<float>(w), tasks, pointer<float>(extra), max_norm,
               pointer<float>(scalars), pointer<float>(norm));
  }, Unlocked());
}

#ifdef MINBERT_HAS_CUDA
void bind_cuda(py::module_& m) {
  py::class_<cuda::Queue>(m, "Queue").def(py::init([](int device, Address stream) {
    return cuda::Queue{device, pointer<void>(stream)};
  }));
  m.def("cuda_gram_workspace", &cuda::gram_workspace);
  m.def("cuda_gram", [](const cuda::Queue& q, const Matrix& j, Address workspace, Address out, bool accumulate) {
    cuda::gram(q, j, pointer<float>(workspace), pointer<float>(out), accumulate);
  }, Unlocked());
  m.def("cuda_combine", [](const cuda::Queue& q, const Matrix& j, Address w, Address out) {
    cuda::combine(q, j, pointer<float>(w), pointer<float>(out));
  }, Unlocked());
  m.def("cuda_adamw", [](const cuda::Queue& q, const Matrix& j, Address w, const Parameters& p, const AdamWOptions& o,
                         Address scalars) {
    cuda::adamw(q, j, pointer<float>(w), p, o, pointer<float>(scalars));
  }, Unlocked());
  m.def("cuda_adamw_rows", [](const cuda::Queue& q, const Matrix& j, Address w, Address row_slot, int64_t width,
                              const Parameters& p, const AdamWOptions& o, Address scalars) {
    cuda::adamw_rows(q, j, pointer<float>(w), pointer<int32_t>(row_slot), width, p, o, pointer<float>(scalars));
  }, Unlocked());
  m.def("cuda_pcgrad_weights", [](const cuda::Queue& q, Address gram, Address order, int tasks, bool mean, Address w,
                                  Address nonfinite) {
    cuda::pcgrad_weights(q, pointer<float>(gram), pointer<int32_t>(order), tasks, mean, pointer<float>(w),
                         pointer<int32_t>(nonfinite));
  }, Unlocked());
  m.def("cuda_clip_scale", [](const cuda::Queue& q, Address gram, Address w, int tasks, Address extra, float max_norm,
                              Address scalars, Address norm) {
    cuda::clip_scale(q, pointer<float>(gram), pointer<float>(w), tasks, pointer<float>(extra), max_norm,
                     pointer<float>(scalars), pointer<float>(norm));
  }, Unlocked());
}
#endif

}  // namespace

void bind_surgery(py::module_& m) {
  py::class_<Matrix>(m, "Matrix").def(py::init(&matrix));
  py::class_<Parameters>(m, "Parameters").def(py::init(&parameters));
  py::class_<AdamWOptions>(m, "AdamWOptions").def(py::init(&options));
  m.attr("max_tasks") = kMaxTasks;
  bind_cpu(m);
#ifdef MINBERT_HAS_CUDA
  bind_cuda(m);
#endif
}

}  // namespace minbert
