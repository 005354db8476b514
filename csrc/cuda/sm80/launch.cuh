// SPDX-License-Identifier: Apache-2.0
// Defines launch.h for one element and head_dim bucket; instantiations/*.cu name them.
#pragma once

#include "../family.cuh"
#include "kernel.cuh"

namespace pfa::cuda::sm80 {

// Calls visit with the Traits of a variant.
template <class Element, int kHeadDim, class Visit>
auto with_traits(const Variant& variant, const Visit& visit) {
  constexpr bool kHasCompact = Element::kBytes == 2 && kHeadDim > 256;
  return with_mask_and_bias(variant, [&](auto mask, auto bias) {
    using Mask = decltype(mask);
    constexpr bool kBias = decltype(bias)::value;
    if constexpr (kHasCompact) {
      if (variant.compact) return visit(Traits<Element, kHeadDim, Mask, kBias, true>{});
    }
    return visit(Traits<Element, kHeadDim, Mask, kBias, false>{});
  });
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
    thread_local int known = -1, blocks = 0;  // as in Device::of
    if (known == device) return blocks;
    allow_shared_memory<T>(forward_kernel<T>, device);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, forward_kernel<T>, T::kThreads,
                                                        T::kSharedBytes),
          [] { return "ask for the occupancy of " + T::name(); });
    known = device;
    return blocks;
  });
}

template <class Element, int kHeadDim>
void launch(const Variant& variant, const Params& params, int64_t blocks, int device,
            cudaStream_t stream) {
  with_traits<Element, kHeadDim>(variant, [&](auto traits) {
    using T = decltype(traits);
    allow_shared_memory<T>(forward_kernel<T>, device);
    Params part = params;
    while (part.first_block < blocks) {
      const int64_t left = blocks - part.first_block;
      const auto grid = static_cast<unsigned>(left < kMaxGrid ? left : kMaxGrid);
      forward_kernel<T><<<grid, T::kThreads, T::kSharedBytes, stream>>>(part);
      check(cudaGetLastError(), [] { return "launch " + T::name(); });
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
