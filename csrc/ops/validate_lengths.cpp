// SPDX-License-Identifier: Apache-2.0
// actual_seq_lengths and actual_seq_lengths_kv: per batch element, not cumulative.
#include <algorithm>

#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

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

DeviceLengths view_tensor(const char* name, const Tensor& tensor, int64_t batch) {
  PFA_CHECK(tensor.dim() == 1, name, " must have one dimension, got shape ", shape_text(tensor));
  check_count(name, tensor.size(0), batch);
  const int64_t stride = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  return {tensor.const_data_ptr(), stride, tensor.dtype() == ScalarType::Long};
}

// Clamped rather than judged, as on a GPU, where nobody sees the values in time.
void read_tensor(const DeviceLengths& lengths, int64_t seqlen, std::vector<int64_t>& used) {
  for (size_t b = 0; b < used.size(); ++b) {
    const int64_t at = static_cast<int64_t>(b) * lengths.stride;
    const int64_t value = lengths.is_int64 ? static_cast<const int64_t*>(lengths.data)[at]
                                           : static_cast<const int32_t*>(lengths.data)[at];
    used[b] = std::clamp<int64_t>(value, 0, seqlen);
  }
}

// Where one problem's lengths of queries or of keys go.
struct Target {
  Backend backend;
  int64_t batch, seqlen;
  std::vector<int64_t>& used;    // (batch), what host points to
  const int64_t*& host;          // null when every element is used in full
  DeviceLengths& on_the_device;  // instead of host, for a tensor in the CUDA backend
};

void set(const char* name, const Lengths& lengths, const Target& target) {
  if (lengths.tensor) {
    const DeviceLengths view = view_tensor(name, *lengths.tensor, target.batch);
    if (target.backend == Backend::kCuda) {
      target.on_the_device = view;
      return;
    }
    target.used.resize(target.batch);
    read_tensor(view, target.seqlen, target.used);
  } else if (lengths.list && !lengths.list->empty()) {
    target.used.resize(target.batch);
    read_list(name, *lengths.list, target.seqlen, target.used);
  } else {
    return;
  }
  const auto full = [&](int64_t value) { return value == target.seqlen; };
  const bool all = std::all_of(target.used.begin(), target.used.end(), full);
  target.host = all ? nullptr : target.used.data();
}

}  // namespace

void set_lengths(const Arguments& args, Call& call) {
  Problem& p = call.problem;
  set("actual_seq_lengths", args.actual_seq_lengths,
      {call.backend, p.batch, p.seqlen_q, call.seqused_q, p.seqused_q, p.device_seqused_q});
  set("actual_seq_lengths_kv", args.actual_seq_lengths_kv,
      {call.backend, p.batch, p.seqlen_k, call.seqused_k, p.seqused_k, p.device_seqused_k});
}

}  // namespace pfa
