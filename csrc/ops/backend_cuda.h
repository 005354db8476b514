// SPDX-License-Identifier: Apache-2.0
// The CUDA backend as torch sees it. Without PFA_WITH_CUDA each of these but the last throws one
// sentence that tells how to get its kernels. Whoever calls has made query's device current.
#pragma once

#include <string>

#include "../problem.h"
#include "arguments.h"

namespace pfa {

void check_cuda_is_built();
void check_cuda_reads_host_memory();

// Enqueues on the caller's current stream. Where query is in host memory it uses stream 0 of device
// 0 and waits, since nobody who owns host memory expects it to change later.
void run_on_cuda(const Tensor& query, const Problem& problem);

[[nodiscard]] std::string choice_of_cuda(const Tensor& query, const Problem& problem);

// Architectures and kernels inside, as cuda/forward.h says them, in a line each. Never throws.
[[nodiscard]] std::string cuda_contents();

}  // namespace pfa
