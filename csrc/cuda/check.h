// SPDX-License-Identifier: Apache-2.0
// Return codes of the CUDA runtime: every one is looked at, and a failure says what was attempted.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace pfa::cuda {

// attempt: a text, or a function that makes one, which every launch would pay for otherwise.
template <class Attempt>
void check(cudaError_t status, const Attempt& attempt) {
  if (status == cudaSuccess) return;
  std::string text;
  if constexpr (std::is_invocable_v<Attempt>) {
    text = attempt();
  } else {
    text = attempt;
  }
  throw std::runtime_error("pfa.forward failed to " + text + ": " + cudaGetErrorString(status));
}

}  // namespace pfa::cuda
