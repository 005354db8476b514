// SPDX-License-Identifier: Apache-2.0
// actual_seq_lengths and actual_seq_lengths_kv: per batch element, not cumulative.
#include <algorithm>

#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

using torch::headeronly::ScalarType;

void check_count(const char* name, int64_t count, int64_t batch) {
  PFA_CHECK(count == 1 || count >= batch, name,
            " must have one entry or at least one per batch element (", batch, "), got ", count);
}

void read_list(const char* name, const std::vector<int64_t>& list, int64_t seqlen,
               std::vector<int64_t>& used) {
  const auto batch = static_cast<int64_t>(used.size());
  check_count(name, static_cast<int64_t>(list.size()), batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t value = list[list.size() == 1 ? 0 : b];
    PFA_CHECK(value >= 0 && value <= seqlen, name, " must lie between 0 and the sequence length ",
              seqlen, ", got ", value, " for batch element ", b);
    used[b] = value;
  }
}

// Clamped rather than judged: on a GPU the values are not known here.
void read_tensor(const char* name, const Tensor& tensor, int64_t seqlen,
                 std::vector<int64_t>& used) {
  PFA_CHECK(tensor.dim() == 1, name, " must have one dimension, got shape ", shape_text(tensor));
  check_count(name, tensor.size(0), static_cast<int64_t>(used.size()));
  const int64_t stride = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  const void* data = tensor.const_data_ptr();
  const bool is_long = tensor.scalar_type() == ScalarType::Long;
  for (size_t b = 0; b < used.size(); ++b) {
    const int64_t at = static_cast<int64_t>(b) * stride;
    const int64_t value =
        is_long ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    used[b] = std::clamp<int64_t>(value, 0, seqlen);
  }
}

// Returns null when every element is used in full.
const int64_t* read_lengths(const char* name, const Lengths& lengths, int64_t seqlen,
                            std::vector<int64_t>& used) {
  if (lengths.tensor) {
    read_tensor(name, *lengths.tensor, seqlen, used);
  } else if (lengths.list && !lengths.list->empty()) {
    read_list(name, *lengths.list, seqlen, used);
  } else {
    return nullptr;
  }
  const auto full = [seqlen](int64_t value) { return value == seqlen; };
  return std::all_of(used.begin(), used.end(), full) ? nullptr : used.data();
}

}  // namespace

void set_lengths(const Arguments& args, Call& call) {
  Problem& p = call.problem;
  call.seqused_q.resize(p.batch);
  call.seqused_k.resize(p.batch);
  p.seqused_q =
      read_lengths("actual_seq_lengths", args.actual_seq_lengths, p.seqlen_q, call.seqused_q);
  p.seqused_k =
      read_lengths("actual_seq_lengths_kv", args.actual_seq_lengths_kv, p.seqlen_k, call.seqused_k);
}

}  // namespace pfa
