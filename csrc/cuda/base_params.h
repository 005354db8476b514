// SPDX-License-Identifier: Apache-2.0
// From a Problem to Params: all but what depends on the plan and on workspace. Host code only.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "params.h"
#include "quant.cuh"

namespace pfa::cuda {

inline bool is_aligned(const void* data, std::initializer_list<int64_t> bytes) {
  const auto aligned = [](int64_t x) { return x % 16 == 0; };
  return aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data))) &&
         std::all_of(bytes.begin(), bytes.end(), aligned);
}

// Strides of dimensions of one element say nothing and may be anything.
template <class View>
StridedTensor strided(const View& view, const Problem& p, int64_t heads, int64_t rows,
                      DType dtype) {
  const int64_t bytes = dtype == DType::kInt8 ? 1 : 2;
  StridedTensor tensor;
  tensor.data = static_cast<char*>(const_cast<void*>(static_cast<const void*>(view.data)));
  tensor.batch = p.batch > 1 ? view.batch * bytes : 0;
  tensor.head = heads > 1 ? view.head * bytes : 0;
  tensor.row = rows > 1 ? view.row * bytes : 0;
  tensor.vectorised =
      is_aligned(view.data, {tensor.batch, tensor.head, tensor.row, p.head_dim * bytes});
  return tensor;
}

inline BiasParams bias_params(const Problem& p) {
  BiasParams bias;
  if (p.bias.data == nullptr) return bias;
  bias.data = static_cast<const char*>(p.bias.data);
  bias.batch = p.bias.batch * 2;
  bias.head = p.bias.head * 2;
  bias.row = p.bias.row * 2;
  bias.vectorised = is_aligned(bias.data, {bias.batch, bias.head, bias.row});
  return bias;
}

inline Params base_params(const Problem& p) {
  Params params;
  params.q = strided(p.q, p, p.num_heads, p.seqlen_q, p.dtype);
  params.k = strided(p.k, p, p.num_heads_k, p.seqlen_k, p.dtype);
  params.v = strided(p.v, p, p.num_heads_k, p.seqlen_k, p.dtype);
  params.out = strided(p.out, p, p.num_heads, p.seqlen_q, p.dtype_out);
  params.lse = p.lse;
  params.dtype_out = p.dtype_out;
  params.batch = p.batch;
  params.seqlen_q = p.seqlen_q;
  params.seqlen_k = p.seqlen_k;
  params.num_heads = static_cast<int>(p.num_heads);
  params.heads_per_group = static_cast<int>(p.heads_per_group());
  params.head_dim = static_cast<int>(p.head_dim);
  params.softmax_scale = p.softmax_scale;
  params.score_unit = score_unit(p.softmax_scale, p.bias.data != nullptr);
  params.band = p.band;
  params.bias = bias_params(p);
  params.quant = p.quant;
  params.longest_first = p.band.hi < Band::kUnbounded;
  params.batch_innermost = p.bias.data != nullptr && p.bias.batch == 0 && p.batch > 1;
  return params;
}

}  // namespace pfa::cuda
