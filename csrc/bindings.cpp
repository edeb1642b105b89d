// SPDX-License-Identifier: Apache-2.0
// The Python module. Surgery's ops take addresses of tensors that minbert_fast/ops/native has checked. The encoder's ops
// take tensors and check them (arguments.h).
#include "bindings.h"

#include "isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "minbert_fast: compiled gradient surgery and CPU kernels";
  m.def("isa", &minbert::isa_name, "The instruction set in use.");
  m.def("set_isa", &minbert::set_isa, pybind11::arg("name"), "Use another instruction set (tests).");
  m.def("isas", &minbert::isa_names, "Those that this build and processor share, plainest first.");
#ifdef MINBERT_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  minbert::bind_surgery(m);
  minbert::bind_add_norm(m);
  minbert::bind_attention(m);
  minbert::bind_bias_gelu(m);
  minbert::bind_embedding(m);
  minbert::bind_linear(m);
}
