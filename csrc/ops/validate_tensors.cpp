// SPDX-License-Identifier: Apache-2.0
// Devices, dtypes, layout, and the shapes of query, key and value against the head counts.
#include <algorithm>
#include <array>
#include <utility>

#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

constexpr int64_t kMaxBatch = 65536;
constexpr int64_t kMaxHeads = 256;
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxHeadsPerGroup = 64;

struct Axes {
  int64_t batch, heads, rows, head_dim;
};

Axes axes_of(const Tensor& tensor, Layout layout, int64_t heads) {
  const auto n = [&](int64_t i) { return tensor.size(i); };
  if (layout == Layout::kBsh) return {n(0), heads, n(1), n(2) / heads};
  if (layout == Layout::kBsnd) return {n(0), n(2), n(1), n(3)};
  return {n(0), n(1), n(2), n(3)};
}

int64_t kv_heads(const Arguments& args) {
  return args.num_key_value_heads == 0 ? args.num_heads : args.num_key_value_heads;
}

void check_heads(const char* name, const Tensor& tensor, Layout layout, const char* heads_name,
                 int64_t heads) {
  if (layout == Layout::kBsh) {
    const int64_t width = tensor.size(2);
    PFA_CHECK(width % heads == 0, name, "'s last dimension must be a multiple of ", heads_name,
              " = ", heads, ", got ", width);
  } else {
    const int64_t found = axes_of(tensor, layout, heads).heads;
    PFA_CHECK(found == heads, name, " must have ", heads_name, " = ", heads, " heads, got ", found,
              " in shape ", shape_text(tensor));
  }
}

void check_head_dim(const char* name, const Tensor& tensor, Layout layout, int64_t heads,
                    int64_t head_dim) {
  const int64_t found = axes_of(tensor, layout, heads).head_dim;
  PFA_CHECK(found == head_dim, name, " must have query's head dimension ", head_dim, ", got ",
            found, " from shape ", shape_text(tensor), " and ", heads,
            " heads (num_key_value_heads, 0 meaning num_heads)");
}

}  // namespace

void check_devices(const Arguments& args) {
  const auto check = [&](const char* name, const Tensor& tensor) {
    PFA_CHECK(tensor.is_on_device_of(args.query), name, " must be on the device of query");
  };
  const auto check_optional = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) check(name, *tensor);
  };
  // A single scale in host memory is read there and passed by value: nobody waits for a device.
  const auto check_scale = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (tensor && !(tensor->is_cpu() && tensor->numel() == 1)) check(name, *tensor);
  };
  check("key", args.key);
  check("value", args.value);
  check_optional("pse_shift", args.pse_shift);
  check_optional("atten_mask", args.atten_mask);
  check_optional("actual_seq_lengths", args.actual_seq_lengths.tensor);
  check_scale("deq_scale1", args.deq_scale1);
  check_scale("quant_scale1", args.quant_scale1);
  check_scale("deq_scale2", args.deq_scale2);
  check_scale("quant_scale2", args.quant_scale2);
  check_scale("quant_offset2", args.quant_offset2);
  check_optional("actual_seq_lengths_kv", args.actual_seq_lengths_kv.tensor);
}

void check_dtypes(const Arguments& args) {
  const ScalarType dtype = args.query.dtype();
  PFA_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char,
            "query must have dtype float16, bfloat16 or int8, got ", dtype_text(args.query));
  PFA_CHECK(args.key.dtype() == dtype, "key must have dtype ", dtype_text(args.query),
            " like query, got ", dtype_text(args.key));
  PFA_CHECK(args.value.dtype() == dtype, "value must have dtype ", dtype_text(args.query),
            " like query, got ", dtype_text(args.value));
  PFA_CHECK(!args.padding_mask, "padding_mask is reserved and must be None, got a tensor of shape ",
            shape_text(*args.padding_mask));
  const auto check_lengths = [](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    const ScalarType found = tensor->dtype();
    PFA_CHECK(found == ScalarType::Int || found == ScalarType::Long, name,
              " must have dtype int32 or int64, got ", dtype_text(*tensor));
  };
  check_lengths("actual_seq_lengths", args.actual_seq_lengths.tensor);
  check_lengths("actual_seq_lengths_kv", args.actual_seq_lengths_kv.tensor);
}

void check_head_counts(const Arguments& args) {
  PFA_CHECK(args.num_heads > 0, "num_heads must be positive, got ", args.num_heads);
  PFA_CHECK(args.num_key_value_heads >= 0,
            "num_key_value_heads must be positive, or 0 for num_heads, got ",
            args.num_key_value_heads);
}

Layout check_layout(const Arguments& args) {
  constexpr std::array<std::pair<const char*, Layout>, 4> kLayouts = {
      {{"BSH", Layout::kBsh},
       {"BSND", Layout::kBsnd},
       {"BNSD", Layout::kBnsd},
       {"BNSD_BSND", Layout::kBnsdBsnd}}};
  const auto* entry = std::find_if(kLayouts.begin(), kLayouts.end(), [&](const auto& candidate) {
    return args.input_layout == candidate.first;
  });
  PFA_CHECK(entry != kLayouts.end(), "input_layout must be BSH, BSND, BNSD or BNSD_BSND, got ",
            args.input_layout);
  const int64_t rank = entry->second == Layout::kBsh ? 3 : 4;
  const auto check_rank = [&](const char* name, const Tensor& tensor) {
    PFA_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimensions for input_layout ",
              args.input_layout, ", got shape ", shape_text(tensor));
  };
  check_rank("query", args.query);
  check_rank("key", args.key);
  check_rank("value", args.value);
  return entry->second;
}

void set_shape(const Arguments& args, Layout layout, Problem& problem) {
  const int64_t heads = args.num_heads;
  const int64_t heads_k = kv_heads(args);
  check_heads("query", args.query, layout, "num_heads", heads);
  check_heads("key", args.key, layout, "num_key_value_heads", heads_k);
  check_heads("value", args.value, layout, "num_key_value_heads", heads_k);
  const Axes q = axes_of(args.query, layout, heads);
  PFA_CHECK(q.head_dim <= kMaxHeadDim, "query must have a head dimension of 1 to ", kMaxHeadDim,
            ", got ", q.head_dim);
  check_head_dim("key", args.key, layout, heads_k, q.head_dim);
  check_head_dim("value", args.value, layout, heads_k, q.head_dim);
  problem.batch = q.batch;
  problem.num_heads = heads;
  problem.num_heads_k = heads_k;
  problem.seqlen_q = q.rows;
  problem.seqlen_k = axes_of(args.key, layout, heads_k).rows;
  problem.head_dim = q.head_dim;
}

void check_groups(const Problem& problem) {
  const int64_t heads = problem.num_heads;
  const int64_t heads_k = problem.num_heads_k;
  PFA_CHECK(heads % heads_k == 0, "num_key_value_heads must divide num_heads, got ", heads_k,
            " and ", heads);
  PFA_CHECK(heads / heads_k <= kMaxHeadsPerGroup, "num_heads must be at most ", kMaxHeadsPerGroup,
            " times num_key_value_heads, got ", heads, " and ", heads_k);
}

void check_batch(const Arguments& args, Layout layout, const Problem& problem) {
  const Axes k = axes_of(args.key, layout, problem.num_heads_k);
  const Axes v = axes_of(args.value, layout, problem.num_heads_k);
  PFA_CHECK(k.batch == problem.batch, "key must have query's batch size ", problem.batch, ", got ",
            k.batch);
  PFA_CHECK(v.batch == problem.batch, "value must have query's batch size ", problem.batch,
            ", got ", v.batch);
  PFA_CHECK(v.rows == k.rows, "value must have key's sequence length ", k.rows, ", got ", v.rows);
  PFA_CHECK(problem.batch <= kMaxBatch, "query must have a batch size of at most ", kMaxBatch,
            ", got ", problem.batch);
  PFA_CHECK(problem.num_heads <= kMaxHeads, "num_heads must be at most ", kMaxHeads, ", got ",
            problem.num_heads);
  PFA_CHECK(k.rows > 0 || args.query.dtype() != ScalarType::Char,
            "key must not be empty when query is int8, got shape ", shape_text(args.key));
}

bool rows_are_before_heads(Layout layout) {
  return layout == Layout::kBsh || layout == Layout::kBsnd;
}

InputView view_of(const Tensor& tensor, Layout layout, int64_t head_dim) {
  const void* data = tensor.const_data_ptr();
  const auto stride = [&](int64_t i) { return tensor.stride(i); };
  if (layout == Layout::kBsh) return {data, stride(0), head_dim, stride(1)};
  if (layout == Layout::kBsnd) return {data, stride(0), stride(2), stride(1)};
  return {data, stride(0), stride(1), stride(2)};
}

}  // namespace pfa
