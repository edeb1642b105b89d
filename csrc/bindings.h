// SPDX-License-Identifier: Apache-2.0
// The parts of the module's Python face, one function an op.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>

namespace minbert {

void bind_surgery(pybind11::module_& m);
void bind_add_norm(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_bias_gelu(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_linear(pybind11::module_& m);

using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

// Tensors arrive as the integers of Tensor.data_ptr(); 0 stands for an absent one.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// How Python passes a C++ argument: pointers as addresses, enumerations as integers, everything else as it is.
template <class T, class = void>
struct FromPython {
  using Type = T;
  static T convert(T value) { return value; }
};
template <class T>
struct FromPython<T*> {
  using Type = uintptr_t;
  static T* convert(uintptr_t address) { return pointer<T>(address); }
};
template <class T>
struct FromPython<T, std::enable_if_t<std::is_enum_v<T>>> {
  using Type = int;
  static T convert(int value) { return static_cast<T>(value); }
};

// Gives Python the function `name`, which runs without the interpreter's lock.
template <class Result, class... Arguments>
void bind(pybind11::module_& m, const char* name, Result (*function)(Arguments...)) {
  m.def(name, [function](typename FromPython<Arguments>::Type... arguments) {
    return function(FromPython<Arguments>::convert(arguments)...);
  }, pybind11::call_guard<pybind11::gil_scoped_release>());
}

// Gives Python the struct `name`, constructed from its members in their order.
template <class Struct, class... Members>
void bind_struct(pybind11::module_& m, const char* name) {
  pybind11::class_<Struct>(m, name).def(pybind11::init([](typename FromPython<Members>::Type... members) {
    return Struct{FromPython<Members>::convert(members)...};
  }));
}

}  // namespace minbert
