// SPDX-License-Identifier: Apache-2.0
// V of int8 as Hopper's tensor cores want it: the keys of a channel contiguous.
//
// The unit is a cell of 32 keys: a row of 32 bytes for each channel, its 16-byte chunks swizzled
// (chunk_offset<2>), so that a tile of any whole number of cells is copied to shared memory as it
// lies here. Among 16 keys the order is 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: the accumulators
// that hold a row's scores are then the operand that multiplies V. Keys beyond the last and
// channels beyond head_dim are zeros.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace pfa::cuda {

constexpr int kTransposedKeys = 32;

struct TransposedValues {
  int64_t cells;  // of a head
  int channels;   // of a cell

  [[nodiscard]] int64_t bytes(const Params& p) const {
    return p.batch * (p.num_heads / p.heads_per_group) * cells * kTransposedKeys * channels;
  }
};

// Enqueues the pass over params.v, whose rows are vectorised; returns the description of `to`,
// whose rows are cells.
[[nodiscard]] StridedTensor transpose_values(const Params& params, const TransposedValues& plan,
                                             void* to, cudaStream_t stream);

}  // namespace pfa::cuda
