// SPDX-License-Identifier: Apache-2.0
// The encoder's CPU operations as Python sees them. minbert_fast/native/layers.py is the only caller, and has checked
// shapes, types and memory; what index tensors hold is checked by the operations themselves.
#include <memory>

#include "bindings.h"
#include "layers.h"

namespace py = pybind11;

namespace minbert {
namespace {

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

Dropout dropout(double p, Address seed, uint32_t site) {
  if (p == 0) return {};
  const auto key = static_cast<uint64_t>(*pointer<int64_t>(seed));
  return {true, key, site, static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1 / (1 - p))};
}

Segments segments(Address bounds, int64_t tasks) { return {pointer<int32_t>(bounds), tasks}; }

TaskGradient task_gradient(Address data, int dtype, int64_t stride) {
  return {pointer<void>(data), static_cast<DType>(dtype), stride};
}

AddNorm add_norm(int dtype, int64_t rows, int64_t width, Address x, Address residual, Address bias, Address gamma,
                 const Dropout& dropout) {
  return {static_cast<DType>(dtype), rows, width, pointer<void>(x), pointer<void>(residual), pointer<float>(bias),
          pointer<float>(gamma), dropout};
}

BiasGelu bias_gelu(int dtype, int64_t rows, int64_t width, Address x, Address bias) {
  return {static_cast<DType>(dtype), rows, width, pointer<void>(x), pointer<float>(bias)};
}

Lookup lookup(Address table, int64_t count, Address index) {
  return {pointer<void>(table), count, pointer<int32_t>(index)};
}

Embedding embedding(int dtype, int64_t rows, int64_t width, const Lookup& word, const Lookup& position,
                    const Lookup& type, Address gamma, const Dropout& dropout) {
  return {static_cast<DType>(dtype), rows, width, {word, position, type}, pointer<float>(gamma), dropout};
}

ColumnSums sums(int dtype, int64_t rows, int64_t width, int64_t stride, Address x) {
  return {static_cast<DType>(dtype), rows, width, stride, pointer<void>(x)};
}

// Attention with the lists that its dense form needs.
struct OwningAttention : Attention {
  std::shared_ptr<const KeptRows> rows_kept;
};

OwningAttention packed_attention(int dtype, int64_t rows, int64_t heads, int64_t head_dim, int64_t stride, Address qkv,
                                 Address cu_seqlens, int64_t sentences, float scale, const Dropout& dropout) {
  return {{static_cast<DType>(dtype), rows, heads, head_dim, stride, pointer<void>(qkv), pointer<int32_t>(cu_seqlens),
           sentences, nullptr, 0, scale, dropout},
          nullptr};
}

OwningAttention dense_attention(int dtype, int64_t sentences, int64_t period, int64_t heads, int64_t head_dim,
                                int64_t stride, Address qkv, Address mask, float scale, const Dropout& dropout) {
  auto kept = std::make_shared<const KeptRows>(pointer<uint8_t>(mask), sentences, period);
  return {{static_cast<DType>(dtype), sentences * period, heads, head_dim, stride, pointer<void>(qkv),
           kept->offsets.data(), sentences, kept->kept.data(), period, scale, dropout},
          kept};
}

}  // namespace

void bind_layers(py::module_& m) {
  m.attr("max_width") = kMaxWidth;
  py::class_<Dropout>(m, "Dropout").def(py::init(&dropout));
  py::class_<Segments>(m, "Segments").def(py::init(&segments));
  py::class_<TaskGradient>(m, "TaskGradient").def(py::init(&task_gradient));
  py::class_<AddNorm>(m, "AddNorm").def(py::init(&add_norm));
  py::class_<BiasGelu>(m, "BiasGelu").def(py::init(&bias_gelu));
  py::class_<Lookup>(m, "Lookup").def(py::init(&lookup));
  py::class_<Embedding>(m, "Embedding").def(py::init(&embedding));
  py::class_<ColumnSums>(m, "ColumnSums").def(py::init(&sums));
  py::class_<OwningAttention>(m, "Attention")
      .def_static("packed", &packed_attention)
      .def_static("dense", &dense_attention);

  m.def("add_norm_forward", [](const AddNorm& op, Address beta, float eps, Address y, Address mean, Address rstd,
                               int threads) {
    add_norm_forward(op, pointer<float>(beta), eps, pointer<void>(y), pointer<float>(mean), pointer<float>(rstd),
                     threads);
  }, Unlocked());
  m.def("add_norm_backward", [](const AddNorm& op, Address dy, Address mean, Address rstd, const Segments& segments,
                                Address dx, Address dresidual, const TaskGradient& dgamma, const TaskGradient& dbeta,
                                const TaskGradient& dbias, int threads) {
    add_norm_backward(op, pointer<void>(dy), pointer<float>(mean), pointer<float>(rstd), segments, pointer<void>(dx),
                      pointer<void>(dresidual), dgamma, dbeta, dbias, threads);
  }, Unlocked());
  m.def("bias_gelu_forward", [](const BiasGelu& op, Address y, int threads) {
    bias_gelu_forward(op, pointer<void>(y), threads);
  }, Unlocked());
  m.def("bias_gelu_backward", [](const BiasGelu& op, Address dy, const Segments& segments, Address dx,
                                 const TaskGradient& dbias, int threads) {
    bias_gelu_backward(op, pointer<void>(dy), segments, pointer<void>(dx), dbias, threads);
  }, Unlocked());
  m.def("embedding_forward", [](const Embedding& op, Address beta, float eps, Address y, Address mean, Address rstd,
                                int threads) {
    embedding_forward(op, pointer<float>(beta), eps, pointer<void>(y), pointer<float>(mean), pointer<float>(rstd),
                      threads);
  }, Unlocked());
  m.def("embedding_backward", [](const Embedding& op, Address dy, Address mean, Address rstd, const Segments& segments,
                                 Address word_order, Address word_offsets, int64_t words, const TaskGradient& dgamma,
                                 const TaskGradient& dbeta, const TaskGradient& dword, const TaskGradient& dposition,
                                 const TaskGradient& dtype, int threads) {
    embedding_backward(op, pointer<void>(dy), pointer<float>(mean), pointer<float>(rstd), segments,
                       pointer<int32_t>(word_order), pointer<int32_t>(word_offsets), words, dgamma, dbeta,
                       {dword, dposition, dtype}, threads);
  }, Unlocked());
  m.def("column_sums", [](const ColumnSums& op, const Segments& segments, const TaskGradient& out, int threads) {
    column_sums(op, segments, out, threads);
  }, Unlocked());
  m.def("attention_forward", [](const OwningAttention& op, Address out, Address lse, int threads) {
    attention_forward(op, pointer<void>(out), pointer<float>(lse), threads);
  }, Unlocked());
  m.def("attention_backward", [](const OwningAttention& op, Address dout, int64_t dout_stride, Address lse,
                                 Address dqkv, int threads) {
    attention_backward(op, pointer<void>(dout), dout_stride, pointer<float>(lse), pointer<void>(dqkv), threads);
  }, Unlocked());
}

}  // namespace minbert
