// SPDX-License-Identifier: Apache-2.0
// Arguments of the encoder's ops: torch tensors as Python passes them, and their checks.
//
// An op's binding lists its arguments once, gets each pointer from an `Arguments`, and passes a plain struct to the loops of
// csrc/cpu. An argument that would make a loop access memory outside a tensor throws std::invalid_argument (ValueError in
// Python) before the loop writes anything.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/layer_norm.h"
#include "cpu/philox.h"
#include "dtype.h"

namespace minbert {

// A view of a strided torch tensor, laid out like DLPack's DLTensor (dmlc.github.io/dlpack), or none.
struct Tensor {
  char* data = nullptr;
  int32_t device = 0, device_index = 0;
  int32_t ndim = -1;  // -1: None
  uint8_t code = 0, bits = 0;
  uint16_t lanes = 0;
  const int64_t *shape = nullptr, *strides = nullptr;
  uint64_t offset = 0;

  explicit operator bool() const { return ndim >= 0; }
  int64_t size(int dimension) const { return dimension < ndim ? shape[dimension] : 0; }
  DType dtype() const;
};

// Reads a torch.Tensor through torch's DLPack exchange functions, without a Python call and without taking a reference.
// Returns false for any other object. Throws torch's own error for a tensor that has no address (sparse, meta).
bool read_tensor(PyObject* object, Tensor& tensor);

using Shape = std::initializer_list<int64_t>;
using DTypes = std::initializer_list<DType>;
constexpr int64_t kAny = -1;  // any size
inline constexpr DTypes kActivations{DType::f32, DType::bf16};

class Arguments {
 public:
  // The address of a contiguous CPU tensor of this shape and one of these dtypes. Errors use `name`.
  template <class T = void>
  T* dense(const char* name, Tensor tensor, Shape shape, DTypes dtypes) {
    return static_cast<T*>(contiguous(name, tensor, shape, dtypes));
  }

  // A bias or a LayerNorm weight [width], fp32 or of the activations' dtype, as fp32.
  const float* vector(const char* name, Tensor tensor, int64_t width, DType dtype);

  // Token-row bounds of the tasks int32 [T + 1], ascending from 0 to at most `rows`.
  Segments segments(Tensor bounds, int64_t rows);

  // Ascending offsets int32 [count + 1] from 0 to at most `limit`.
  const int32_t* offsets(const char* name, Tensor tensor, int64_t limit);

  // Indices int32 [count], of which the first `used` must be in [0, limit).
  const int32_t* indices(const char* name, Tensor tensor, int64_t count, int64_t used, int64_t limit);

  // An output gradient [T, ...], fp32 or bf16. Each task's part is contiguous; the task stride is free. None: not wanted.
  // The gradient may not share memory with a tensor that this object checked before.
  TaskGradient gradient(const char* name, Tensor tensor, Shape shape);

  // Dropout of probability p in [0, 1), drawn from (seed int64 [1], site).
  Dropout dropout(double p, Tensor seed, int64_t site);

  // Uninitialised memory, aligned to the largest register and freed with this object.
  float* floats(int64_t count);

  // Checks the row width of a LayerNorm.
  static void width(int64_t width);

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  // Memory of `count` parts of `size` bytes, `pitch` bytes from one to the next.
  struct Span {
    const char* name;
    uintptr_t begin, size, pitch, count;
    bool output;

    bool meets(const Span& other) const;
  };

  void* contiguous(const char* name, Tensor tensor, Shape shape, DTypes dtypes);

  std::vector<Span> spans_;
  std::vector<std::unique_ptr<float, Free>> memory_;
};

}  // namespace minbert

template <>
struct pybind11::detail::type_caster<minbert::Tensor> {
  PYBIND11_TYPE_CASTER(minbert::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return source.is_none() || minbert::read_tensor(source.ptr(), value); }
};
