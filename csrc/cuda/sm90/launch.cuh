// SPDX-License-Identifier: Apache-2.0
// Defines launch.h for one element and head_dim bucket; instantiations/*.cu name them.
#pragma once

#include <algorithm>
#include <numeric>

#include "../device.h"
#include "../family.cuh"
#include "kernel.cuh"

namespace pfa::cuda::sm90 {

template <class Element, int kHeadDim, class Mask, bool kHasBias>
using TraitsOf = std::conditional_t<(kHeadDim > 256 && !quant::Of<Element>::kIsInteger),
                                    WideTraits<Element, kHeadDim, Mask, kHasBias>,
                                    Traits<Element, kHeadDim, Mask, kHasBias>>;

// Calls visit with the Traits of a variant.
template <class Element, int kHeadDim, class Visit>
auto with_traits(const Variant& variant, const Visit& visit) {
  return with_mask_and_bias(variant, [&](auto mask, auto bias) {
    return visit(TraitsOf<Element, kHeadDim, decltype(mask), decltype(bias)::value>{});
  });
}

template <class Element, int kHeadDim>
KernelInfo info(const Variant& variant) {
  return with_traits<Element, kHeadDim>(variant, [](auto traits) {
    using T = decltype(traits);
    return KernelInfo{T::kBlockM, T::kBlockN, T::kThreads, T::kSharedBytes, T::kSlices};
  });
}

template <class Element, int kHeadDim>
int blocks_per_sm(const Variant&, int) {
  return 1;
}

// Does the work of a block depend on its rows, but not on its head? A dense mask is the same for
// all heads.
inline bool depends_on_rows(const Params& p) { return p.longest_first || p.mask.bits != nullptr; }

// Blocks of threads stay and take several blocks of work each where it is known how these compare;
// elsewhere the GPU hands them out.
inline bool is_uniform(const Params& p) {
  const auto absent = [](const LengthsParams& lengths) {
    return lengths.data == nullptr && !lengths.is_inline;
  };
  const bool whole = absent(p.seqused_q) && absent(p.seqused_k);
  return whole && (!depends_on_rows(p) || (p.split.count == 1 && !p.batch_innermost));
}

// About as many heads as have K and V in two thirds of an H100's L2 together, but such a number
// that every block of threads has as many blocks of work of each section.
inline uint32_t heads_of_section(const Params& p, int64_t grid) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  const int64_t all = p.batch * p.num_heads;
  const int64_t fitting = kBytes / (4 * p.seqlen_k * p.head_dim) * p.heads_per_group;
  const int64_t step = grid / std::gcd(grid, p.num_m_blocks);
  return static_cast<uint32_t>(std::min(std::max<int64_t>(fitting / step, 1) * step, all));
}

// Rows and keys are fewer than half of that (why_not_mappable): a band that reaches further is
// unlimited, and int has room for the sums of all three.
constexpr int64_t kFarthest = int64_t{1} << 30;

template <class T>
void launch_workers(const Arguments& arguments, unsigned workers, cudaStream_t stream) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {T::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(workers * T::kSlices);
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = T::kCluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, forward_kernel<T>, arguments),
        [] { return "launch " + T::name(); });
}

template <class Element, int kHeadDim>
void launch(const Variant& variant, const Params& params, int64_t blocks, int device,
            cudaStream_t stream) {
  with_traits<Element, kHeadDim>(variant, [&](auto traits) {
    using T = decltype(traits);
    allow_shared_memory<T>(forward_kernel<T>, device);
    Arguments a{};
    a.params = params;
    a.params.band.lo = std::max(params.band.lo, -kFarthest);
    a.params.band.hi = std::min(params.band.hi, kFarthest);
    a.maps = make_tensor_maps(
        params, {T::kBoxColumns, T::kBlockM, T::kBlockN, T::kRowsV, T::Element::kBytes});
    const TailParams& tail = params.split.tail;
    a.blocks = static_cast<uint32_t>(tail.blocks > 0 ? tail.first : blocks);
    const bool stays = is_uniform(params);
    const int workers = Device::of(device).multiprocessors / T::kSlices;
    if (stays && depends_on_rows(params)) a.section = heads_of_section(params, workers);
    const int64_t most = stays ? workers : kMaxGrid / T::kSlices;
    do {
      const int64_t left = blocks - a.params.first_block;
      const auto grid = static_cast<unsigned>(left < most && tail.blocks == 0 ? left : most);
      if (!stays) a.blocks = static_cast<uint32_t>(a.params.first_block + grid);
      launch_workers<T>(a, grid, stream);
      a.params.first_block += grid;
    } while (!stays && a.params.first_block < blocks);
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
