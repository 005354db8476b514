// SPDX-License-Identifier: Apache-2.0
// Return codes of the CUDA runtime: every one is looked at, and a failure says what was attempted.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace pfa::cuda {

inline void check(cudaError_t status, const std::string& attempt) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("pfa.forward failed to " + attempt + ": " + cudaGetErrorString(status));
}

}  // namespace pfa::cuda
