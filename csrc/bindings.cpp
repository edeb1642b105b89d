// SPDX-License-Identifier: Apache-2.0
// The Python module. Surgery's ops take addresses of tensors that minbert_fast/ops/native has checked. The encoder's ops
// take tensors and check them (arguments.h). Only this file includes pybind11, which compiles slowly.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>

#include "encoder.h"
#include "isa.h"
#include "surgery.h"

namespace py = pybind11;

namespace minbert {
namespace {

// DLPack 1.x: DLPackExchangeAPI.
struct Exchange {
  uint32_t major, minor;
  const void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* tensor);
  const void* current_stream;
};

// Reads a torch.Tensor through torch's DLPack exchange functions, without a Python call and without taking a reference.
// Returns false for any other object. Throws torch's own error for a tensor that has no address (sparse, meta).
bool read_tensor(PyObject* object, Tensor& tensor) {
  static PyObject* const type = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static const Exchange* const exchange = [] {
    const py::object capsule = py::handle(type).attr("__dlpack_c_exchange_api__");
    const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!found) throw py::error_already_set();
    if (static_cast<const Exchange*>(found)->major != 1)
      throw std::runtime_error("this torch uses a DLPack version other than 1: minbert_fast needs an update");
    return static_cast<const Exchange*>(found);
  }();
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type))) return false;
  if (exchange->tensor_from_object(object, &tensor) != 0) throw py::error_already_set();
  return true;
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
void bind(py::module_& m, const char* name, Result (*function)(Arguments...)) {
  m.def(name, [function](typename FromPython<Arguments>::Type... arguments) {
    return function(FromPython<Arguments>::convert(arguments)...);
  }, py::call_guard<py::gil_scoped_release>());
}

// Binds the struct as `name`, constructed from its members in their order.
template <class Struct, class... Members>
void bind_struct(py::module_& m, const char* name) {
  py::class_<Struct>(m, name).def(py::init([](typename FromPython<Members>::Type... members) {
    return Struct{FromPython<Members>::convert(members)...};
  }));
}

}  // namespace
}  // namespace minbert

template <>
struct pybind11::detail::type_caster<minbert::Tensor> {
  PYBIND11_TYPE_CASTER(minbert::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return source.is_none() || minbert::read_tensor(source.ptr(), value); }
};

PYBIND11_MODULE(_C, m) {
  using namespace minbert;
  m.doc() = "minbert_fast: compiled gradient surgery and CPU kernels";
  m.def("isa", &isa_name, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set (tests).");
  m.def("isas", &isa_names, "Those that this build and processor share, plainest first.");
#ifdef MINBERT_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  bind(m, "add_norm_forward", add_norm_forward);
  bind(m, "add_norm_backward", add_norm_backward);
  bind(m, "attention_forward", attention_forward);
  bind(m, "attention_backward", attention_backward);
  bind(m, "bias_gelu_forward", bias_gelu_forward);
  bind(m, "bias_gelu_backward", bias_gelu_backward);
  bind(m, "embedding_forward", embedding_forward);
  bind(m, "embedding_backward", embedding_backward);
  bind(m, "column_sums", column_sums);

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
