// SPDX-License-Identifier: Apache-2.0
// A tensor as the operator needs it. torch::stable::Tensor counts its owners on the heap and asks
// torch anew at every question; a call has up to eleven tensors and asks hundreds of questions.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <memory>

namespace pfa {

using torch::headeronly::ScalarType;

using Sizes = std::array<int64_t, 4>;  // of a tensor that pfa makes

// The one owner of a handle, and what torch says of it, read once.
class Tensor {
 public:
  Tensor() = default;  // none
  explicit Tensor(AtenTensorHandle owned);

  // Contiguous, on the device of another. Throws std::runtime_error where there is no memory.
  static Tensor empty(const Sizes& sizes, int64_t dim, ScalarType dtype, const Tensor& beside);

  [[nodiscard]] int64_t dim() const { return dim_; }
  [[nodiscard]] const int64_t* sizes() const { return sizes_; }
  [[nodiscard]] int64_t size(int64_t i) const { return sizes_[i]; }
  [[nodiscard]] int64_t stride(int64_t i) const { return strides_[i]; }
  [[nodiscard]] int64_t numel() const;
  [[nodiscard]] ScalarType dtype() const { return dtype_; }  // Undefined: one pfa has no name for
  [[nodiscard]] bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  [[nodiscard]] int device_index() const { return device_index_; }
  [[nodiscard]] bool is_on_device_of(const Tensor& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }
  [[nodiscard]] bool is_contiguous() const;
  [[nodiscard]] bool requires_grad() const;  // what it says counts under grad mode alone
  [[nodiscard]] const void* const_data_ptr() const;
  [[nodiscard]] void* mutable_data_ptr() const;

  [[nodiscard]] Tensor contiguous() const;
  void zero();
  void fill(double value);
  [[nodiscard]] AtenTensorHandle release() { return handle_.release(); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;  // torch's
  int64_t* strides_ = nullptr;
  ScalarType dtype_ = ScalarType::Undefined;
  int32_t device_type_ = 0, device_index_ = 0;
};

}  // namespace pfa
