// SPDX-License-Identifier: Apache-2.0
// The order of the checks (docs/semantics.md, section 8), the output, and the pointers.
#include "validate.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "../cpu/half.h"
#include "check.h"
#include "validate_steps.h"

namespace pfa {
namespace {

DType problem_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Char) return DType::kInt8;
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

ScalarType output_dtype(const Arguments& args) {
  if (args.quant_scale2) return ScalarType::Char;
  const ScalarType dtype = args.query.dtype();
  return dtype == ScalarType::Char ? ScalarType::Half : dtype;
}

Tensor new_output(const Arguments& args, Layout layout, bool zeros) {
  const Tensor& q = args.query;
  Sizes sizes{};
  std::copy_n(q.sizes(), q.dim(), sizes.begin());
  if (layout == Layout::kBnsdBsnd) std::swap(sizes[1], sizes[2]);
  try {
    Tensor out = Tensor::empty(sizes, q.dim(), output_dtype(args), q);
    if (zeros) out.zero();
    return out;
  } catch (const std::runtime_error&) {  // the reason does not cross the stable ABI before 2.13
    throw std::runtime_error("pfa.forward could not allocate an output as large as query, " +
                             shape_text(q));
  }
}

// (B, N, Sq). Of an empty query no more is known than its rank.
Tensor new_lse(const Arguments& args, Layout layout, bool no_keys) {
  const Tensor& q = args.query;
  const bool rows_first = rows_are_before_heads(layout);
  const int64_t heads = layout == Layout::kBsh ? args.num_heads : q.size(rows_first ? 2 : 1);
  const Sizes sizes{q.size(0), std::max<int64_t>(heads, 0), q.size(rows_first ? 1 : 2)};
  try {
    Tensor lse = Tensor::empty(sizes, 3, ScalarType::Float, q);
    if (no_keys) lse.fill(-std::numeric_limits<double>::infinity());
    return lse;
  } catch (const std::runtime_error&) {
    throw std::runtime_error("pfa.forward_lse could not allocate softmax_lse for query of shape " +
                             shape_text(q));
  }
}

// The tensor itself if its last dimension can be read in steps of one element, else a copy.
const Tensor& readable(const Tensor& tensor, Call& call) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  return call.copies.emplace_back(tensor.contiguous());
}

// Beside inputs in host memory, which kernels can read where such a call gets here, scalars of rank
// 0 stand for those that came to a GPU from the host, so that both ways can be tested without one.
bool passed_by_value(const Tensor& scale, const Arguments& args, Backend backend) {
  if (backend == Backend::kCpu || !scale.is_cpu() || scale.numel() != 1) return false;
  return !args.query.is_cpu() || scale.dim() == 0;
}

const Tensor* given(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

Scale scale_of(const Tensor* tensor, const Arguments& args, Call& call) {
  if (tensor == nullptr) return {};
  const bool per_channel = tensor->numel() != 1;
  const bool copy = per_channel && !tensor->is_contiguous();
  const Tensor& dense = copy ? call.copies.emplace_back(tensor->contiguous()) : *tensor;
  ScaleType type = ScaleType::kPacked64;
  if (dense.dtype() == ScalarType::Float) type = ScaleType::kFloat32;
  if (dense.dtype() == ScalarType::BFloat16) type = ScaleType::kBFloat16;
  Scale scale{dense.const_data_ptr(), type, per_channel ? 1 : 0};
  if (passed_by_value(dense, args, call.backend)) {
    const float value = cpu::read_scale(scale, 0);
    scale = {};
    scale.given_by_value = true;
    scale.value = value;
  }
  return scale;
}

void set_mask_data(const Tensor& mask, Call& call) {
  const Tensor& dense = readable(mask, call);
  const int64_t rank = dense.dim();
  Mask& view = call.problem.mask;
  view.data = static_cast<const uint8_t*>(dense.const_data_ptr());
  view.row = dense.stride(rank - 2);
  view.batch = rank > 2 && dense.size(0) > 1 ? dense.stride(0) : 0;
}

void set_bias_data(const Tensor& pse, Call& call) {
  const Tensor& dense = readable(pse, call);
  Bias& view = call.problem.bias;
  view.data = dense.const_data_ptr();
  view.row = dense.stride(2);
  view.head = dense.stride(1);
  view.batch = dense.size(0) > 1 ? dense.stride(0) : 0;
}

OutputView output_view(const Tensor& out, const Problem& p, bool rows_first) {
  const int64_t row = rows_first ? p.num_heads * p.head_dim : p.head_dim;
  const int64_t head = rows_first ? p.head_dim : p.seqlen_q * p.head_dim;
  return {out.mutable_data_ptr(), p.num_heads * p.seqlen_q * p.head_dim, head, row};
}

// Every check has passed; from here on tensors are copied where their strides demand it.
void set_data(const Arguments& args, Layout layout, Call& call) {
  Problem& p = call.problem;
  p.q = view_of(readable(args.query, call), layout, p.head_dim);
  p.k = view_of(readable(args.key, call), layout, p.head_dim);
  p.v = view_of(readable(args.value, call), layout, p.head_dim);
  if (call.lse) p.lse = static_cast<float*>(call.lse->mutable_data_ptr());
  p.out = output_view(call.out, p, rows_are_before_heads(layout) || layout == Layout::kBnsdBsnd);
  if (reads_mask(args)) set_mask_data(*args.atten_mask, call);
  if (args.pse_shift) set_bias_data(*args.pse_shift, call);
  p.quant.descale_s = scale_of(given(args.deq_scale1), args, call);
  p.quant.scale_p = scale_of(given(args.quant_scale1), args, call);
  p.quant.descale_o = scale_of(given(args.deq_scale2), args, call);
  p.quant.scale_out = scale_of(given(args.quant_scale2), args, call);
  p.quant.offset_out = scale_of(given_offset(args), args, call);
}

void set_problem(const Arguments& args, Layout layout, Call& call) {
  Problem& p = call.problem;
  set_shape(args, layout, p);
  check_scale_combination(args);
  check_groups(p);
  check_batch(args, layout, p);
  set_lengths(args, call);
  check_sparse_mode(args);
  set_mask(args, p);
  set_bias(args, p);
  set_band(args, p);
  check_interception(args, p);
  check_scale_shapes(args, p);
  p.dtype = problem_dtype(args.query.dtype());
  p.dtype_out = problem_dtype(output_dtype(args));
  p.softmax_scale = static_cast<float>(args.scale_value);
}

// Everything but memory; returns the layout.
Layout judge(const Arguments& args, Call& call) {
  check_devices(args);
  check_dtypes(args);
  check_mask_dtypes(args);
  const bool empty = args.query.numel() == 0;
  if (!empty) {
    check_scale_dtypes(args);
    check_head_counts(args);
  }
  const Layout layout = check_layout(args);
  if (!empty) set_problem(args, layout, call);
  call.nothing_to_compute = empty || call.problem.seqlen_k == 0;
  return layout;
}

}  // namespace

Call make_call(const Arguments& args, Backend backend, bool with_lse) {
  Call call{};
  call.backend = backend;
  const Layout layout = judge(args, call);
  call.out = new_output(args, layout, call.nothing_to_compute);
  if (with_lse) call.lse = new_lse(args, layout, call.nothing_to_compute);
  if (!call.nothing_to_compute) set_data(args, layout, call);
  return call;
}

void check_call(const Arguments& args) {
  Call call{};
  judge(args, call);
}

}  // namespace pfa
