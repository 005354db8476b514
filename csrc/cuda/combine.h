// SPDX-License-Identifier: Apache-2.0
// Small passes around the attention kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace pfa::cuda {

constexpr int kMaxSplits = 32;

// Enqueues the merge of the pieces of every row that was cut into params.out.
void combine_splits(const Params& params, cudaStream_t stream);

// Enqueues the writing of `count` host values to device memory. They travel in the launches: unlike
// a copy from pageable memory, a captured graph replays them after the host's array is gone.
void store_lengths(const int64_t* values, int64_t count, int64_t* device_values,
                   cudaStream_t stream);

}  // namespace pfa::cuda
