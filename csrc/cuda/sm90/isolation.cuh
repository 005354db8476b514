// SPDX-License-Identifier: Apache-2.0
// 0 * NaN is NaN: a key that a row does not see must not enter P V with an infinity or a NaN. So
// the rows of V that have one become zeros and those keys NaN, which scores carry to the rows that
// see them. Only for the rare second run of a block.
#pragma once

#include "block.cuh"

namespace pfa::cuda::sm90 {

// A key's chunk i, in the order in which they lie in a tile of K or V.
template <class T>
__device__ __forceinline__ int chunk_of(int key, int i) {
  return i / T::kBoxChunks * T::kBoxK + key * T::kBoxRowBytes + i % T::kBoxChunks * kChunkBytes;
}

// In the tile of K of that turn, which has arrived, and V's. All consumers call it together.
template <class T>
__device__ void isolate_nonfinite_values(const Rings<T>& shared, Turn<T::kStages> turn) {
  ptx::mbarrier_wait(shared.full_v(turn), turn.parity());  // V's ring turns like K's
  const int first = static_cast<int>(threadIdx.x) - kWarpgroup;
  char* v = Shared<T>::pointer(shared.v(turn));
  char* k = Shared<T>::pointer(shared.k(turn));
#pragma unroll 1
  for (int key = first; key < T::kBlockN; key += T::kConsumerThreads) {
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < T::kBoxes * T::kBoxChunks; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(v + chunk_of<T>(key, i));
      found |= has_nonfinite<typename T::Element>(x.x) || has_nonfinite<typename T::Element>(x.y) ||
               has_nonfinite<typename T::Element>(x.z) || has_nonfinite<typename T::Element>(x.w);
    }
#pragma unroll 1
    for (int i = 0; found && i < T::kBoxes * T::kBoxChunks; ++i) {
      *reinterpret_cast<uint4*>(v + chunk_of<T>(key, i)) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(k + chunk_of<T>(key, i)) = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
  ptx::fence_async_proxy();
  ptx::barrier_sync(kAllConsumers, T::kConsumerThreads);
}

}  // namespace pfa::cuda::sm90
