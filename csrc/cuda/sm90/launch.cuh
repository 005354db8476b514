// SPDX-License-Identifier: Apache-2.0
// Defines launch.h for one element and head_dim bucket; instantiations/*.cu name them.
#pragma once

#include <atomic>
#include <string>

#include "../check.h"
#include "../launch.h"
#include "kernel.cuh"

namespace pfa::cuda::sm90 {

// Calls visit with the Traits of a variant.
template <class Element, int kHeadDim, class Visit>
auto with_traits(const Variant& variant, const Visit& visit) {
  if (variant.bias) {
    if (variant.dense) return visit(Traits<Element, kHeadDim, mask::Dense, true>{});
    return visit(Traits<Element, kHeadDim, mask::Band, true>{});
  }
  if (variant.dense) return visit(Traits<Element, kHeadDim, mask::Dense, false>{});
  return visit(Traits<Element, kHeadDim, mask::Band, false>{});
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
int blocks_per_sm(const Variant&, int) {
  return 1;
}

// Blocks of threads stay and take several blocks of work each where all are the same work, or all
// pairs; elsewhere the GPU hands them out.
inline bool is_uniform(const Params& p) {
  const auto absent = [](const LengthsParams& lengths) {
    return lengths.data == nullptr && !lengths.is_inline;
  };
  const bool whole = absent(p.seqused_q) && absent(p.seqused_k) && p.mask.bits == nullptr;
  const bool in_pairs = p.longest_first;
  return whole &&
         (!in_pairs || (p.num_m_blocks % 2 == 0 && p.split.count == 1 && !p.batch_innermost));
}

template <class Element, int kHeadDim>
void launch(const Variant& variant, const Params& params, int64_t blocks, int device,
            cudaStream_t stream) {
  with_traits<Element, kHeadDim>(variant, [&](auto traits) {
    using T = decltype(traits);
    allow_shared_memory<T>(device);
    Arguments a{};
    a.params = params;
    a.maps = make_tensor_maps(params, {T::kBoxColumns, T::kBlockM, T::kBlockN});
    a.blocks = blocks;
    const bool stays = is_uniform(params);
    a.in_pairs = stays && params.longest_first;
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "read the attributes of the GPU");
    const int64_t units = a.in_pairs ? blocks / 2 : blocks;
    const int64_t most = stays ? multiprocessors : kMaxGrid;
    do {
      const int64_t left = units - a.params.first_block;
      const auto grid = static_cast<unsigned>(left < most ? left : most);
      if (!stays) a.blocks = a.params.first_block + grid;
      forward_kernel<T><<<grid, T::kThreads, T::kSharedBytes, stream>>>(a);
      check(cudaGetLastError(), "launch " + T::name());
      a.params.first_block += grid;
    } while (!stays && a.params.first_block < units);
  });
}

}  // namespace pfa::cuda::sm90

// NOTE: a function template is instantiated explicitly once for all uses of its name in launch.h.
#define PFA_INSTANTIATE_SM90(Element, kHeadDim)                                                   \
  template pfa::cuda::KernelInfo pfa::cuda::sm90::info<pfa::cuda::Element, kHeadDim>(             \
      const Variant&);                                                                            \
  template int pfa::cuda::sm90::blocks_per_sm<pfa::cuda::Element, kHeadDim>(const Variant&, int); \
  template void pfa::cuda::sm90::launch<pfa::cuda::Element, kHeadDim>(                            \
      const Variant&, const Params&, int64_t, int, cudaStream_t);
