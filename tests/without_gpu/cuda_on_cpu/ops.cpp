// SPDX-License-Identifier: Apache-2.0
// The CUDA ops with C's calling convention, for ctypes: pointers to functions, and the error of a call that returned -1.
#include <exception>
#include <type_traits>

#include "surgery.h"

namespace {

thread_local std::string error;

template <auto op>
struct Guarded;
template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct Guarded<op> {
  static int64_t call(Arguments... arguments) try {
    if constexpr (!std::is_void_v<Result>) return op(arguments...);
    else return op(arguments...), 0;
  } catch (const std::exception& caught) {
    error = caught.what();
    return -1;
  }
};

}  // namespace

extern "C" {
const char* last_error() { return error.c_str(); }
#define EXPORT(result, name, arguments) extern const auto name = &Guarded<minbert::cuda::name>::call;
MINBERT_SURGERY_OPS(EXPORT)
}
