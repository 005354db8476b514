// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "check.h"

namespace pfa::cuda {

// What a call needs to know of a GPU.
struct Device {
  int compute_capability = 0;  // 10 major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block can have

  // A thread rarely changes its device: what it read last is kept.
  static const Device& of(int device) {
    thread_local int known = -1;
    thread_local Device gpu;
    if (known != device) gpu = read(device);
    known = device;
    return gpu;
  }

 private:
  static Device read(int device) {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "read the attributes of the GPU");
      return value;
    };
    return {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }
};

}  // namespace pfa::cuda
