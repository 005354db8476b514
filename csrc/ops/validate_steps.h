// SPDX-License-Identifier: Apache-2.0
// The steps of make_call. check_* only judge; set_* judge, then write their fields of Problem. A
// step relies on the steps before it, in the order of make_call.
#pragma once

#include <cstdint>
#include <optional>

#include "../problem.h"
#include "arguments.h"
#include "validate.h"

namespace pfa {

// Axes of query and output. BNSD_BSND reads BNSD and writes BSND.
enum class Layout : uint8_t { kBsh, kBsnd, kBnsd, kBnsdBsnd };

// validate_tensors.cpp: the tensors by themselves and against the head counts.
void check_devices(const Arguments& args);
void check_dtypes(const Arguments& args);
void check_head_counts(const Arguments& args);
[[nodiscard]] Layout check_layout(const Arguments& args);
void set_shape(const Arguments& args, Layout layout, Problem& problem);
void check_groups(const Problem& problem);
void check_batch(const Arguments& args, Layout layout, const Problem& problem);
[[nodiscard]] bool rows_are_before_heads(Layout layout);
[[nodiscard]] InputView view_of(const Tensor& tensor, Layout layout, int64_t head_dim);

// validate_lengths.cpp
void set_lengths(const Arguments& args, Call& call);

// validate_mask.cpp: which (query, key) pairs take part, and the bias. set_mask and set_bias leave
// the data pointers alone.
void check_mask_dtypes(const Arguments& args);
void check_sparse_mode(const Arguments& args);
void set_mask(const Arguments& args, Problem& problem);
void set_bias(const Arguments& args, Problem& problem);
void set_band(const Arguments& args, Problem& problem);
[[nodiscard]] bool reads_mask(const Arguments& args);

// validate_quant.cpp
[[nodiscard]] const Tensor* given_offset(const Arguments& args);  // none when it is empty
void check_scale_dtypes(const Arguments& args);
void check_scale_combination(const Arguments& args);
void check_interception(const Arguments& args, const Problem& problem);
void check_scale_shapes(const Arguments& args, const Problem& problem);

// Lengths in a tensor are not known when a call is judged (on a GPU they would need a
// synchronisation), so no rule may depend on them, on any device.
[[nodiscard]] inline bool lengths_are_known(const Arguments& args) {
  return !args.actual_seq_lengths.tensor && !args.actual_seq_lengths_kv.tensor;
}

}  // namespace pfa
