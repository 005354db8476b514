// SPDX-License-Identifier: Apache-2.0
// How keys that a row does not see are kept from it whatever stands in V, above head_dim 256.
#pragma once

#include "scores.cuh"
#include "wide_block.cuh"

namespace pfa::cuda::sm90 {

// 0 * NaN is NaN: a key that a row does not see must not enter P V with an infinity or a NaN. So V
// is cleared of them, and keys that had one have NaN for a score, which reaches the rows that see
// them. All consumers call it together.
template <class T>
class Isolation {
  using Element = typename T::Element;

 public:
  __device__ explicit Isolation(const WideShared<T>& shared) : shared_(shared) {}

  // Between these, all chunks of a tile of V are looked through: `part` is which of its keys.
  __device__ void begin() const {
    sync_consumers();
    if (recomputed(threadIdx.x) == kWarpgroup) {
      for (int part = 0; part < T::kChunksV; ++part) shared_.flags()[part] = 0;
    }
    sync_consumers();
  }
  __device__ void look_through(uint32_t slot, int part) const {
    const bool found = find(slot, [](uint4&) {});
    const uint32_t keys = __ballot_sync(0xffffffffu, found);
    if (lane() == 0) atomicOr(&shared_.flags()[part], keys);
  }
  __device__ void end() const { sync_consumers(); }

  // The scores of that tile.
  __device__ void mark(Scores<T>& s) const {
    const uint32_t* flags = shared_.flags();
#pragma unroll
    for (int n = 0; n < T::kTilesS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = 8 * n + accumulator_column(lane(), e);
        if ((flags[key / kWarp] >> key % kWarp & 1) != 0) s[0][n][e] = __int_as_float(0x7fffffff);
      }
    }
  }

  // A chunk of V before it is multiplied.
  __device__ void clear(uint32_t slot) const {
    find(slot, [](uint4& x) { x = make_uint4(0, 0, 0, 0); });
    ptx::fence_async_proxy();
    sync_consumers();
  }

 private:
  [[nodiscard]] __device__ static int lane() {
    return static_cast<int>(recomputed(threadIdx.x) % kWarp);
  }
  __device__ static void sync_consumers() { ptx::barrier_sync(kAllConsumers, T::kConsumerThreads); }

  // Two warps have a box of a chunk, half of its columns each, and a lane has a key. Calls visit
  // for 16 bytes with such a value.
  template <class Visit>
  __device__ static bool find(uint32_t slot, const Visit& visit) {
    constexpr int kChunks = T::kBoxRowBytes / kChunkBytes / 2;
    static_assert(T::kRowsV == kWarp);
    const int warp = first_row() / 16;
    bool found = false;
    if (warp >= 2 * T::kBoxesChunkV) return found;
    char* row = Shared<T>::pointer(slot + warp / 2 * T::kBoxV + lane() * T::kBoxRowBytes);
#pragma unroll 1
    for (int i = warp % 2 * kChunks; i < (warp % 2 + 1) * kChunks; ++i) {
      uint4& x = *reinterpret_cast<uint4*>(row + i * kChunkBytes);
      if (has_nonfinite<Element>(x.x) || has_nonfinite<Element>(x.y) ||
          has_nonfinite<Element>(x.z) || has_nonfinite<Element>(x.w)) {
        found = true;
        visit(x);
      }
    }
    return found;
  }

  WideShared<T> shared_;
};

}  // namespace pfa::cuda::sm90
