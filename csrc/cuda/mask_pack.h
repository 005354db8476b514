// SPDX-License-Identifier: Apache-2.0
// The pass over a dense mask that runs before the attention kernel, on the same stream.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace pfa::cuda {

// Sizes and strides of a packed mask for blocks of block_m rows and tiles of block_n keys.
struct PackedMaskPlan {
  int64_t masks;  // 1, or one per batch element
  int64_t row_groups, key_cells, num_m_blocks, num_tiles;

  PackedMaskPlan(const Problem& problem, int block_m, int block_n);
  [[nodiscard]] int64_t bits_bytes() const;
  [[nodiscard]] int64_t classes_bytes() const;
  [[nodiscard]] PackedMaskParams params(void* bits, void* classes) const;
};

// Enqueues the pass that fills `packed`; its pointers are written through.
void pack_mask(const Problem& problem, const PackedMaskPlan& plan, const PackedMaskParams& packed,
               int block_m, int block_n, cudaStream_t stream);

}  // namespace pfa::cuda
