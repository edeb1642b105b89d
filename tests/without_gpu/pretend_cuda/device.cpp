// SPDX-License-Identifier: Apache-2.0
// A "cuda" device for CPU builds of PyTorch. Its memory is the host's, and its kernels are those of the CPU.
//
// Tensors know that they are on cuda:0. Operations refuse tensors of both devices, as they do on a GPU. Every operation
// without a kernel in this file (`run_on_cpu`) runs on CPU tensors of the same memory. Fresh memory holds NaN.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::Stream;

namespace {

const Device kDevice(c10::DeviceType::CUDA, 0);
const Stream kStream(Stream::DEFAULT, kDevice);

// ---- The parts of a device: a guard, memory, hooks ----

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return kStream; }
  Stream getNewStream(Device, int) const override { return kStream; }
  Stream exchangeStream(Stream) const noexcept override { return kStream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes ? std::aligned_alloc(512, (bytes + 511) / 512 * 512) : nullptr;
    if (p) std::memset(p, 0xff, bytes);
    return {p, p, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
const bool registered = (c10::SetAllocator(c10::DeviceType::CUDA, &memory, 1), true);

}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {  // PyTorch looks for a class of this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

// ---- Kernels: new tensors, views, sizes, copies ----

// A CPU tensor of the same memory.
Tensor host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  char* begin = static_cast<char*>(t.storage().mutable_data());
  const size_t skip = t.storage_offset() * t.itemsize(), all = t.storage().nbytes();
  c10::DataPtr data(begin ? begin + skip : nullptr, new Tensor(t), [](void* t) { delete static_cast<Tensor*>(t); },
                    c10::DeviceType::CPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), all > skip ? all - skip : 0, std::move(data),
                       c10::GetAllocator(c10::DeviceType::CPU), true);
  Tensor alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), t.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return alias;
}

Tensor fresh(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA), dtype);
}

at::ScalarType or_default(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, DispatchKeySet(DispatchKey::CUDA),
                                   or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return fresh(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), or_default(dtype));
}

Tensor as_strided(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  std::optional<int64_t> begin;
  if (offset) begin = offset->expect_int();
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
}

Tensor view(const Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void resize(const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
  const size_t bytes = at::detail::computeStorageNbytes(size, stride, t.itemsize(), t.storage_offset());
  const c10::Storage storage = t.storage();
  if (storage.nbytes() < bytes) {
    c10::DataPtr larger = memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(larger));
    storage.set_nbytes(bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
}

const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  resize(t, sizes, c10::contiguous_strides(sizes));
  return t;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  host(self).copy_(host(source));
  return self;
}

Tensor& set_part(Tensor& t, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                 offset.expect_int());
  return t;
}

Tensor& set_all(Tensor& t, c10::Storage storage) {
  const c10::SymInt size = static_cast<int64_t>(storage.nbytes() / t.itemsize()), one = 1;
  return set_part(t, std::move(storage), 0, size, one);
}

void record_stream(Tensor&, Stream) {}

// ---- All other operations ----

void run_on_cpu(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& schema = op.schema();
  const size_t arguments = schema.arguments().size(), first = stack->size() - arguments;
  std::vector<std::pair<Tensor, Tensor>> aliases;  // (on the CPU, ours)
  bool asks_for_cpu = false, reads_cpu = false;
  const auto to_host = [&](const Tensor& t) {
    if (t.defined() && !t.is_cuda()) reads_cpu |= t.dim() > 0;
    if (!t.defined() || !t.is_cuda()) return t;
    aliases.emplace_back(host(t), t);
    return aliases.back().first;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(to_host(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<Tensor>(to_host(*t)) : t);
      value = list;
    } else if (value.isDevice()) {
      asks_for_cpu = value.toDevice().is_cpu();
      value = Device(c10::DeviceType::CPU);
    }
  }
  const bool may_mix = schema.name().find("index") != std::string::npos || schema.name().find("copy") != std::string::npos;
  TORCH_CHECK(aliases.empty() || !reads_cpu || may_mix, schema.name(), " reads tensors of cuda:0 and of the CPU");
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (const auto& [alias, ours] : aliases)
    if (alias.sizes() != ours.sizes()) {  // an `out` that the operation gave another size
      resize(ours, alias.sizes(), alias.strides());
      host(ours).copy_(alias);
    }
  const auto to_device = [&](const Tensor& t) {
    if (!t.defined() || asks_for_cpu) return t;
    for (const auto& [alias, ours] : aliases)
      if (t.is_same(alias)) return ours;
    for (const auto& [alias, ours] : aliases)
      if (t.storage().data() && t.storage().data() == alias.storage().data())
        return at::native::as_strided_tensorimpl(ours, t.sizes(), t.strides(), ours.storage_offset() + t.storage_offset());
    Tensor result = fresh(t.sizes(), t.strides(), t.scalar_type());
    host(result).copy_(t);
    return result;
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(to_device(t));
      value = list;
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("alias", at::native::alias);
  m.impl("resize_", resize_);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_all);
  m.impl("record_stream", record_stream);
  // Otherwise PyTorch calls `mse_loss.out` with an output that the CPU's kernel takes for too small.
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY(pretend_cuda, m) { m.def("host(Tensor t) -> Tensor"); }
TORCH_LIBRARY_IMPL(pretend_cuda, CUDA, m) { m.impl("host", host); }
