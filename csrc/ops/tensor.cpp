// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

namespace pfa {
namespace {

namespace stable = torch::stable::detail;

// The numbers that torch's functions give to dtypes may differ from ScalarType's.
ScalarType named(int32_t dtype) {
  static const std::array<std::pair<int32_t, ScalarType>, 13> kNames = {
      {{aoti_torch_dtype_float16(), ScalarType::Half},
       {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
       {aoti_torch_dtype_int8(), ScalarType::Char},
       {aoti_torch_dtype_float32(), ScalarType::Float},
       {aoti_torch_dtype_bool(), ScalarType::Bool},
       {aoti_torch_dtype_uint8(), ScalarType::Byte},
       {aoti_torch_dtype_int64(), ScalarType::Long},
       {aoti_torch_dtype_int32(), ScalarType::Int},
       {aoti_torch_dtype_uint64(), ScalarType::UInt64},
       {aoti_torch_dtype_float64(), ScalarType::Double},
       {aoti_torch_dtype_int16(), ScalarType::Short},
       {aoti_torch_dtype_uint16(), ScalarType::UInt16},
       {aoti_torch_dtype_uint32(), ScalarType::UInt32}}};
  for (const auto& [number, name] : kNames) {
    if (number == dtype) return name;
  }
  return ScalarType::Undefined;
}

// Calls an operator of one tensor, which it takes over.
StableIValue call_unary(const char* name, AtenTensorHandle owned) {
  std::array<StableIValue, 1> stack{stable::from(owned)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

}  // namespace

Tensor::Tensor(AtenTensorHandle owned) : handle_(owned) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(owned, &dim_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(owned, &sizes_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(owned, &strides_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(owned, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(owned, &device_type_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(owned, &device_index_));
  dtype_ = named(dtype);
}

Tensor Tensor::empty(const Sizes& sizes, int64_t dim, ScalarType dtype, const Tensor& beside) {
  Sizes strides{};
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(), stable::to<int32_t>(stable::from(dtype)),
      beside.device_type_, beside.device_index_, &handle));
  return Tensor(handle);
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
  return count;
}

bool Tensor::is_contiguous() const {
  bool answer = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_.get(), &answer));
  return answer;
}

// The stable ABI cannot be asked; but under grad mode a view of a tensor that requires grad is
// never a leaf.
bool Tensor::requires_grad() const {
  if (dtype_ == ScalarType::Char) return false;
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(handle_.get(), sizes_, strides_, &view));
  return !stable::to<bool>(call_unary("aten::is_leaf", view));
}

const void* Tensor::const_data_ptr() const {
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_.get(), &data));
  return data;
}

void* Tensor::mutable_data_ptr() const {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
  return data;
}

Tensor Tensor::contiguous() const {
  AtenTensorHandle copy = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_.get(), &copy));
  using torch::headeronly::MemoryFormat;
  std::array<StableIValue, 2> stack{stable::from(copy), stable::from(MemoryFormat::Contiguous)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  return Tensor(stable::to<AtenTensorHandle>(stack[0]));
}

void Tensor::zero() { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(handle_.get())); }

void Tensor::fill(double value) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_fill__Scalar(handle_.get(), value));
}

}  // namespace pfa
