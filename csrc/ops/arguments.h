// SPDX-License-Identifier: Apache-2.0
// The schema's arguments under the caller's names. Nothing below validate.h sees these names.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace pfa {

// A host list (overload "forward") or an integer tensor on the call's device
// ("forward.tensor_lens").
struct Lengths {
  std::optional<std::vector<int64_t>> list;
  std::optional<Tensor> tensor;
};

enum class Backend : uint8_t { kCpu, kCuda };

struct Arguments {
  Tensor query, key, value;
  std::optional<Tensor> pse_shift;
  std::optional<Tensor> padding_mask;
  std::optional<Tensor> atten_mask;  // nonzero = masked OUT
  Lengths actual_seq_lengths;
  std::optional<Tensor> deq_scale1, quant_scale1, deq_scale2, quant_scale2, quant_offset2;
  int64_t num_heads;
  double scale_value;
  int64_t pre_tokens;
  int64_t next_tokens;
  std::string input_layout;
  int64_t num_key_value_heads;  // 0 = num_heads
  Lengths actual_seq_lengths_kv;
  int64_t sparse_mode;
  // It has made sure that nothing requires grad, and leaves out a compressed mask.
  bool from_front_end = false;
};

}  // namespace pfa
