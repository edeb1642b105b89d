// SPDX-License-Identifier: Apache-2.0
// A torch tensor as the encoder's ops see it.
#pragma once

#include <cstdint>

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

}  // namespace minbert
