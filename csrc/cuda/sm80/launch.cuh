// SPDX-License-Identifier: Apache-2.0
// Defines launch.h for one element and head_dim bucket; instantiations/*.cu name them.
#pragma once

#include <atomic>
#include <string>

#include "../check.h"
#include "../launch.h"
#include "kernel.cuh"

namespace pfa::cuda::sm80 {

// Calls visit with the Traits of a variant.
template <class Element, int kHeadDim, class Visit>
auto with_traits(const Variant& variant, const Visit& visit) {
  constexpr bool kHasCompact = Element::kBytes == 2 && kHeadDim > 256;
  const auto with_mask = [&](auto compact, auto bias) {
    constexpr bool kBias = decltype(bias)::value, kCompact = decltype(compact)::value;
    if (variant.dense) return visit(Traits<Element, kHeadDim, mask::Dense, kBias, kCompact>{});
    return visit(Traits<Element, kHeadDim, mask::Band, kBias, kCompact>{});
  };
  const auto with_bias = [&](auto compact) {
    return variant.bias ? with_mask(compact, std::true_type{})
                        : with_mask(compact, std::false_type{});
  };
  if constexpr (kHasCompact) {
    if (variant.compact) return with_bias(std::true_type{});
  }
  return with_bias(std::false_type{});
}

// Lets a kernel use its shared memory, once per device: 64 devices have a bit each.
template <class T>
void allow_shared_memory(int device) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((done.load(std::memory_order_acquire) & bit) != 0) return;
  check(cudaFuncSetAttribute(forward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             T::kSharedBytes),
        "reserve " + std::to_string(T::kSharedBytes) + " bytes of shared memory for " + T::name());
  done.fetch_or(bit, std::memory_order_release);
}

template <class Element, int kHeadDim>
KernelInfo info(const Variant& variant) {
  return with_traits<Element, kHeadDim>(variant, [](auto traits) {
    using T = decltype(traits);
    return KernelInfo{T::kBlockM, T::kBlockN, T::kThreads, T::kSharedBytes};
  });
}

template <class Element, int kHeadDim>
int blocks_per_sm(const Variant& variant, int device) {
  return with_traits<Element, kHeadDim>(variant, [&](auto traits) {
    using T = decltype(traits);
    allow_shared_memory<T>(device);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, forward_kernel<T>, T::kThreads,
                                                        T::kSharedBytes),
          "ask for the occupancy of " + T::name());
    return blocks;
  });
}

template <class Element, int kHeadDim>
void launch(const Variant& variant, const Params& params, int64_t blocks, int device,
            cudaStream_t stream) {
  with_traits<Element, kHeadDim>(variant, [&](auto traits) {
    using T = decltype(traits);
    allow_shared_memory<T>(device);
    Params part = params;
    while (part.first_block < blocks) {
      const int64_t left = blocks - part.first_block;
      const auto grid = static_cast<unsigned>(left < kMaxGrid ? left : kMaxGrid);
      forward_kernel<T><<<grid, T::kThreads, T::kSharedBytes, stream>>>(part);
      check(cudaGetLastError(), "launch " + T::name());
      part.first_block += grid;
    }
  });
}

}  // namespace pfa::cuda::sm80

// NOTE: a function template is instantiated explicitly once for all uses of its name in launch.h.
#define PFA_INSTANTIATE_SM80(Element, kHeadDim)                                                   \
  template pfa::cuda::KernelInfo pfa::cuda::sm80::info<pfa::cuda::Element, kHeadDim>(             \
      const Variant&);                                                                            \
  template int pfa::cuda::sm80::blocks_per_sm<pfa::cuda::Element, kHeadDim>(const Variant&, int); \
  template void pfa::cuda::sm80::launch<pfa::cuda::Element, kHeadDim>(                            \
      const Variant&, const Params&, int64_t, int, cudaStream_t);
