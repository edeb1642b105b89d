// SPDX-License-Identifier: Apache-2.0
// The parts of the module's Python face, one function a room.
#pragma once

#include <pybind11/pybind11.h>

namespace minbert {

void bind_surgery(pybind11::module_& m);
void bind_layers(pybind11::module_& m);

// Tensors arrive as the integers of Tensor.data_ptr(); 0 stands for an absent one.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace minbert
