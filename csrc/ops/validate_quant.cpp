// SPDX-License-Identifier: Apache-2.0
// int8: which scales a call needs, forbids, and what they look like. Their values are never read
// here.
#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

__extension__ typedef __int128 Wide;  // sums of a token count and two lengths

bool is_deq_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::UInt64 || dtype == ScalarType::Long;
}

void check_deq_dtype(const char* name, const std::optional<Tensor>& scale) {
  PFA_CHECK(!scale || is_deq_dtype(scale->dtype()), name,
            " must have dtype float32, uint64 or int64, got ", dtype_text(*scale));
}

void check_given(const char* name, const std::optional<Tensor>& scale, bool int8_query) {
  PFA_CHECK(!int8_query || scale, name, " must be given when query is int8, got None");
  PFA_CHECK(int8_query || !scale, name,
            " must be None unless query is int8, got a tensor of shape ", shape_text(*scale));
}

void check_one_element(const char* name, const std::optional<Tensor>& scale) {
  PFA_CHECK(!scale || scale->numel() == 1, name, " must have one element, got shape ",
            shape_text(*scale));
}

// Whether the band leaves some used row of batch element b out, by the reference's formulas.
bool leaves_rows_out(const Arguments& args, int64_t q, int64_t kv) {
  const int64_t mode = args.sparse_mode;
  if (mode == 0) return args.atten_mask && Wide{q} - kv - args.pre_tokens > 0;
  if (mode == 3) return kv < q;
  return mode == 4 && Wide{args.next_tokens} + kv - q < 0;
}

}  // namespace

const Tensor* given_offset(const Arguments& args) {
  const auto& offset = args.quant_offset2;
  return offset && offset->numel() > 0 ? &*offset : nullptr;
}

void check_scale_dtypes(const Arguments& args) {
  check_deq_dtype("deq_scale1", args.deq_scale1);
  check_deq_dtype("deq_scale2", args.deq_scale2);
  if (args.deq_scale1 && args.deq_scale2) {
    PFA_CHECK(args.deq_scale1->dtype() == args.deq_scale2->dtype(), "deq_scale2 must have dtype ",
              dtype_text(*args.deq_scale1), " like deq_scale1, got ", dtype_text(*args.deq_scale2));
  }
  PFA_CHECK(!args.quant_scale1 || args.quant_scale1->dtype() == ScalarType::Float,
            "quant_scale1 must have dtype float32, got ", dtype_text(*args.quant_scale1));
  const bool bfloat = args.query.dtype() == ScalarType::BFloat16;
  const char* allowed =
      bfloat ? "float32 or bfloat16" : "float32 (bfloat16 needs a bfloat16 query)";
  const auto check_quant2 = [&](const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.dtype();
    PFA_CHECK(dtype == ScalarType::Float || (bfloat && dtype == ScalarType::BFloat16), name,
              " must have dtype ", allowed, ", got ", dtype_text(tensor));
  };
  const Tensor* offset = given_offset(args);
  if (args.quant_scale2) check_quant2("quant_scale2", *args.quant_scale2);
  if (offset != nullptr) check_quant2("quant_offset2", *offset);
  if (args.quant_scale2 && offset != nullptr) {
    PFA_CHECK(offset->dtype() == args.quant_scale2->dtype(), "quant_offset2 must have dtype ",
              dtype_text(*args.quant_scale2), " like quant_scale2, got ", dtype_text(*offset));
  }
}

void check_scale_combination(const Arguments& args) {
  const bool int8_query = args.query.dtype() == ScalarType::Char;
  check_given("deq_scale1", args.deq_scale1, int8_query);
  check_given("quant_scale1", args.quant_scale1, int8_query);
  check_given("deq_scale2", args.deq_scale2, int8_query);
  PFA_CHECK(args.quant_scale2 || given_offset(args) == nullptr,
            "quant_offset2 must be None unless quant_scale2 is given, got a tensor of shape ",
            shape_text(*args.quant_offset2));
}

// A row that takes no part gives integer 0, which is not the quantised 0.0 when there is an offset;
// calls that are sure to contain such rows are refused as the seed API refuses them.
void check_interception(const Arguments& args, const Problem& problem) {
  if (!args.quant_scale2) return;
  const int64_t mode = args.sparse_mode;
  PFA_CHECK(mode != 4 || (args.pre_tokens >= 0 && args.next_tokens >= 0),
            "pre_tokens and next_tokens must not be negative for an int8 output in sparse_mode 4, "
            "got ",
            args.pre_tokens, " and ", args.next_tokens);
  if (given_offset(args) == nullptr) return;
  PFA_CHECK(mode != 0 || !args.atten_mask || args.next_tokens >= 0,
            "next_tokens must not be negative when quant_offset2 is given, got ", args.next_tokens);
  if (!lengths_are_known(args)) return;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t q = problem.rows_used(b);
    const int64_t kv = problem.keys_used(b);
    PFA_CHECK(!leaves_rows_out(args, q, kv),
              "quant_offset2 must be None when the band of sparse_mode ", mode,
              " leaves rows without keys, got one with pre_tokens = ", args.pre_tokens,
              ", next_tokens = ", args.next_tokens, " and lengths ", q, " and ", kv,
              " of batch element ", b);
  }
}

void check_scale_shapes(const Arguments& args, const Problem& problem) {
  check_one_element("deq_scale1", args.deq_scale1);
  check_one_element("quant_scale1", args.quant_scale1);
  check_one_element("deq_scale2", args.deq_scale2);
  if (!args.quant_scale2) return;
  const int64_t channels = problem.num_heads * problem.head_dim;
  const int64_t count = args.quant_scale2->numel();
  PFA_CHECK(count == 1 || count == channels,
            "quant_scale2 must have one element or num_heads * head_dim = ", channels,
            ", got shape ", shape_text(*args.quant_scale2));
  const Tensor* offset = given_offset(args);
  PFA_CHECK(offset == nullptr || offset->numel() == count,
            "quant_offset2 must have as many elements as ", "quant_scale2 (", count,
            "), got shape ", shape_text(*offset));
}

}  // namespace pfa
