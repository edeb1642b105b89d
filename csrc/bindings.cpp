// SPDX-License-Identifier: Apache-2.0
// The Python face of the extension. It takes raw pointers, sizes and strides; minbert_fast/native checks them first.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "minbert_fast: compiled gradient surgery and CPU kernels"; }
