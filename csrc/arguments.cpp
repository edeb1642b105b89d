// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace minbert {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string list(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i)
    text += (i ? ", " : "") + (values[i] == kAny ? std::string("any") : std::to_string(values[i]));
  return text + "]";
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    default: return "bool";
  }
}

std::string name_of(Tensor t) {
  const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  return (t.code < 7 ? kinds[t.code] : "element") + (t.code == 6 ? std::string() : std::to_string(t.bits));
}

bool dense_from(Tensor t, int first) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= first; --i) {
    if (t.shape[i] == 0) return true;
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

int64_t elements(Tensor t, int first) {
  int64_t count = 1;
  for (int i = first; i < t.ndim; ++i) count *= t.shape[i];
  return count;
}

void check(const std::string& name, Tensor tensor, Shape shape, DTypes dtypes) {
  if (!tensor) refuse(name + " must be a tensor, not None");
  const auto dimensions = static_cast<int64_t>(shape.size());
  bool fits = tensor.ndim == dimensions;
  for (int64_t i = 0; fits && i < dimensions; ++i)
    fits = shape.begin()[i] == kAny || shape.begin()[i] == tensor.shape[i];
  if (!fits)
    refuse(name + " must have shape " + list(shape.begin(), dimensions) + ", not " + list(tensor.shape, tensor.ndim));
  if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype()) == dtypes.end()) {
    std::string wanted;
    for (const DType dtype : dtypes) wanted += (wanted.empty() ? "" : " or ") + std::string(name_of(dtype));
    refuse(name + " must be " + wanted + ", not " + name_of(tensor));
  }
  if (tensor.device != 1) refuse(name + " must be on the CPU");
}

}  // namespace

DType Tensor::dtype() const {
  switch (code << 8 | bits) {
    case 2 << 8 | 32: return DType::f32;
    case 4 << 8 | 16: return DType::bf16;
    case 0 << 8 | 32: return DType::i32;
    case 0 << 8 | 64: return DType::i64;
    case 6 << 8 | 8: return DType::boolean;
    default: return DType::other;
  }
}

void* Arguments::contiguous(const char* name, Tensor tensor, Shape shape, DTypes dtypes) {
  check(name, tensor, shape, dtypes);
  if (!dense_from(tensor, 0))
    refuse(std::string(name) + " must be contiguous, but its strides are " + list(tensor.strides, tensor.ndim));
  const auto size = static_cast<uintptr_t>(elements(tensor, 0)) * tensor.bits / 8;
  char* data = tensor.data + tensor.offset;
  spans_.push_back({name, reinterpret_cast<uintptr_t>(data), size, size, 1, false});
  return data;
}

const float* Arguments::vector(const char* name, Tensor tensor, int64_t width, DType dtype) {
  const void* data = dense(name, tensor, {width}, {DType::f32, dtype});
  if (tensor.dtype() == DType::f32) return static_cast<const float*>(data);
  float* copy = floats(width);
  for (int64_t i = 0; i < width; ++i) copy[i] = portable::to_float(static_cast<const bfloat16*>(data)[i]);
  return copy;
}

const int32_t* Arguments::offsets(const char* name, Tensor tensor, int64_t limit) {
  const int32_t* values = dense<int32_t>(name, tensor, {kAny}, {DType::i32});
  const int64_t count = tensor.size(0) - 1;
  if (count < 0) refuse(std::string(name) + " must hold at least one entry");
  if (values[0] != 0) refuse(std::string(name) + " must begin with 0");
  for (int64_t i = 0; i < count; ++i)
    if (values[i + 1] < values[i])
      refuse(std::string(name) + " must not descend, but entry " + std::to_string(i + 1) + " does");
  if (values[count] > limit)
    refuse(std::string(name) + " ends with " + std::to_string(values[count]) + ", but there are " +
           std::to_string(limit) + " rows");
  return values;
}

const int32_t* Arguments::indices(const char* name, Tensor tensor, int64_t count, int64_t used, int64_t limit) {
  const int32_t* values = dense<int32_t>(name, tensor, {count}, {DType::i32});
  for (int64_t i = 0; i < used; ++i)
    if (values[i] < 0 || values[i] >= limit)
      refuse(std::string(name) + " holds " + std::to_string(values[i]) + ", which is not in [0, " +
             std::to_string(limit) + ")");
  return values;
}

Segments Arguments::segments(Tensor bounds, int64_t rows) {
  return {offsets("bounds", bounds, rows), bounds.size(0) - 1};
}

bool Arguments::Span::meets(const Span& other) const {
  if (!size || !other.size || !count || !other.count) return false;
  const uintptr_t end = begin + (count - 1) * pitch + size;
  const uintptr_t other_end = other.begin + (other.count - 1) * other.pitch + other.size;
  if (end <= other.begin || other_end <= begin) return false;
  if (count < 2 || pitch != other.pitch) return true;
  // Both are column ranges of one J: their rows interleave without overlap if the columns differ.
  const uintptr_t ahead = other.begin >= begin ? (other.begin - begin) % pitch
                                               : pitch - 1 - (begin - other.begin - 1) % pitch;
  return ahead < size || ahead + other.size > pitch;
}

TaskGradient Arguments::gradient(const char* name, Tensor tensor, Shape shape) {
  if (!tensor) return {nullptr, DType::f32, 0};
  check(name, tensor, shape, kActivations);
  const int64_t tasks = tensor.shape[0], size = elements(tensor, 1), stride = tasks > 1 ? tensor.strides[0] : size;
  if (!dense_from(tensor, 1))
    refuse("each row of " + std::string(name) + " must be contiguous, but its strides are " +
           list(tensor.strides, tensor.ndim));
  if (stride < size)
    refuse("the rows of " + std::string(name) + " must not overlap, but its strides are " +
           list(tensor.strides, tensor.ndim));
  char* data = tensor.data + tensor.offset;
  const uintptr_t width = tensor.bits / 8;
  const Span span{name, reinterpret_cast<uintptr_t>(data), static_cast<uintptr_t>(size) * width,
                  static_cast<uintptr_t>(stride) * width, static_cast<uintptr_t>(tasks), true};
  for (const Span& other : spans_)
    if (span.meets(other))
      refuse(other.output ? std::string(other.name) + " and " + name + " must not share memory"
                          : std::string(name) + " must not share memory with an input");
  spans_.push_back(span);
  return {data, tensor.dtype(), stride};
}

Dropout Arguments::dropout(double p, Tensor seed, int64_t site) {
  if (p == 0) return {};
  const auto key = static_cast<uint64_t>(*dense<int64_t>("seed", seed, {1}, {DType::i64}));
  if (site < 0 || site > INT32_MAX) refuse("site must be in [0, 2^31), not " + std::to_string(site));
  return {true, key, static_cast<uint32_t>(site), static_cast<uint32_t>(p * 4294967296.0),
          static_cast<float>(1 / (1 - p))};
}

float* Arguments::floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  memory_.emplace_back(static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64)));
  if (!memory_.back()) throw std::bad_alloc();
  return memory_.back().get();
}

void Arguments::width(int64_t width) {
  if (width < 1 || width > kMaxWidth)
    refuse("the hidden size must be 1 to " + std::to_string(kMaxWidth) + ", not " + std::to_string(width));
}

}  // namespace minbert
