// SPDX-License-Identifier: Apache-2.0
// A bias whose rows TMA cannot read is copied, before the attention kernel and on the same stream,
// to rows that start at multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace pfa::cuda {

struct BiasCopyPlan {
  int64_t batches, heads;  // 1 where all share one
  int64_t rows, row_bytes;
  bool repeats;  // one row stands for all: there are as many copies of it as a block has rows

  BiasCopyPlan(const Problem& problem, int block_m);
  [[nodiscard]] int64_t bytes() const { return batches * heads * rows * row_bytes; }
  [[nodiscard]] BiasParams params(const void* data) const;
};

// Is it one of those? Rows that share their memory are: TMA could not step through them.
[[nodiscard]] bool is_copied(const BiasParams& bias, int64_t seqlen_q);

// Enqueues the copy to what params() describes.
void copy_bias(const Problem& problem, const BiasCopyPlan& plan, void* to, cudaStream_t stream);

}  // namespace pfa::cuda
