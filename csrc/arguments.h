// SPDX-License-Identifier: Apache-2.0
// Checks of the encoder's ops on their arguments.
//
// An op gets each pointer from an `Arguments`, and passes a plain struct to the loops of csrc/cpu. An argument that would
// make a loop access memory outside a tensor throws std::invalid_argument (ValueError in Python) before the loop writes
// anything.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/layer_norm.h"
#include "cpu/philox.h"
#include "tensor.h"

namespace minbert {

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
