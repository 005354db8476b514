// SPDX-License-Identifier: Apache-2.0
// The seam between the dispatcher and the kernels: one function per (element, head_dim bucket), so
// that each can be compiled on its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace pfa::cuda {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

// pfa.jit.load can leave these out, and files of csrc/cuda/instantiations: what is declared weak
// below is a null pointer then.
#ifdef PFA_WITHOUT_DENSE
constexpr bool kBuiltWithDense = false;
#else
constexpr bool kBuiltWithDense = true;
#endif
#ifdef PFA_WITHOUT_BIAS
constexpr bool kBuiltWithBias = false;
#else
constexpr bool kBuiltWithBias = true;
#endif
#define PFA_MAY_BE_ABSENT __attribute__((weak, visibility("hidden")))

// The kernels of one (element, head_dim bucket): which tile a variant has, and how it is launched.
struct Variant {
  bool dense = false;  // a packed mask
  bool bias = false;
  bool compact = false;  // see sm80/config.cuh: tile_of
};
struct KernelInfo {
  int block_m, block_n, threads, shared_bytes;
  int multiprocessors = 1;  // that compute a block
};

namespace sm80 {

template <class Element, int kHeadDim>
[[nodiscard]] PFA_MAY_BE_ABSENT KernelInfo info(const Variant& variant);

// Blocks of a variant that fit an SM at once. The device is current.
template <class Element, int kHeadDim>
[[nodiscard]] PFA_MAY_BE_ABSENT int blocks_per_sm(const Variant& variant, int device);

// Enqueues `blocks` blocks in as many grids as they need.
template <class Element, int kHeadDim>
PFA_MAY_BE_ABSENT void launch(const Variant& variant, const Params& params, int64_t blocks,
                              int device, cudaStream_t stream);

}  // namespace sm80

// Calls whose tensors TMA can read: see sm90/tensor_map.h. Not in a library that was
// compiled without 9.0a.
namespace sm90 {

template <class Element, int kHeadDim>
[[nodiscard]] PFA_MAY_BE_ABSENT KernelInfo info(const Variant& variant);
template <class Element, int kHeadDim>
[[nodiscard]] PFA_MAY_BE_ABSENT int blocks_per_sm(const Variant& variant, int device);
template <class Element, int kHeadDim>
PFA_MAY_BE_ABSENT void launch(const Variant& variant, const Params& params, int64_t blocks,
                              int device, cudaStream_t stream);

}  // namespace sm90
}  // namespace pfa::cuda
