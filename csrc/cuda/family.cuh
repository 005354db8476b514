// SPDX-License-Identifier: Apache-2.0
// What the launch.cuh of every family shares: from a Variant to types, and the right to a kernel's
// shared memory.
#pragma once

#include <atomic>
#include <string>
#include <type_traits>

#include "check.h"
#include "launch.h"
#include "mask.cuh"

namespace pfa::cuda {

// Calls visit with a mask policy and a std::bool_constant that says whether there is a bias.
template <class Visit>
auto with_mask_and_bias(const Variant& variant, const Visit& visit) {
  const auto with_mask = [&](auto mask) {
    if constexpr (kBuiltWithBias) {
      if (variant.bias) return visit(mask, std::true_type{});
    }
    return visit(mask, std::false_type{});
  };
  if constexpr (kBuiltWithDense) {
    if (variant.dense) return with_mask(mask::Dense{});
  }
  return with_mask(mask::Band{});
}

// Lets the kernel of these traits use its shared memory, once per device: 64 devices have a bit
// each.
template <class T, class Kernel>
void allow_shared_memory(Kernel* kernel, int device) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((done.load(std::memory_order_acquire) & bit) != 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes),
        [] {
          return "reserve " + std::to_string(T::kSharedBytes) + " bytes of shared memory for " +
                 T::name();
        });
  done.fetch_or(bit, std::memory_order_release);
}

}  // namespace pfa::cuda
