// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module, one function for each op.
#pragma once

#include <pybind11/pybind11.h>

namespace minbert {

void bind_surgery(pybind11::module_& m);
void bind_add_norm(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_bias_gelu(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_linear(pybind11::module_& m);

using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace minbert
