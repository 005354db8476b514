// SPDX-License-Identifier: Apache-2.0
// What the producer and the consumers of a cluster above head_dim 256 tell each other.
#pragma once

#include "block.cuh"
#include "wide_config.cuh"

namespace pfa::cuda::sm90 {

// Turns of a ring of buffers, in registers of their own: the compiler divides by no kSize.
template <int kSize>
struct WideTurn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < kSize) return;
    stage = 0;
    parity ^= 1;
  }
};

// Shared memory by address. The first block of a cluster computes the scores of even tiles and the
// second those of odd ones. For each of its tiles the ring carries V of its tile before that one,
// K, V of the tile right before, and the bias; of V its columns alone. At the end comes V of its
// last tile, and that of a last tile that is the other's. In a careful run each tile begins with
// all of its V, to be looked through.
template <class T>
struct WideShared : Shared<T> {
  [[nodiscard]] __device__ uint32_t q() const { return at(T::kQ); }
  [[nodiscard]] __device__ uint32_t full_q() const { return barrier(0); }
  [[nodiscard]] __device__ uint32_t empty_q() const { return barrier(1); }
  [[nodiscard]] __device__ uint32_t slot(int i) const { return at(T::kRing + i * T::kSlot); }
  [[nodiscard]] __device__ uint32_t full(int i) const { return barrier(kFirst + i); }
  [[nodiscard]] __device__ uint32_t empty(int i) const { return barrier(kFirst + T::kSlots + i); }

  // P of a warpgroup's rows, and their maxima: on its way to the other block, or from there.
  [[nodiscard]] __device__ uint32_t p(int warpgroup) const {
    return at(T::kP + warpgroup * T::kBytesP);
  }
  [[nodiscard]] __device__ uint32_t maxima(int warpgroup) const {
    return at(T::kMaxima + warpgroup * T::kBytesMaxima);
  }
  [[nodiscard]] __device__ uint32_t full_p(int warpgroup) const { return barrier(2 + warpgroup); }

  // The other block's sums of the rows. `turn`, 0 or 1, changes from block of work to block of
  // work.
  [[nodiscard]] __device__ uint32_t sums(int turn) const {
    return at(T::kSums + turn * (T::kBlockM * 4));
  }
  [[nodiscard]] __device__ uint32_t full_sums(int warpgroup) const {
    return barrier(2 + T::kConsumers + warpgroup);
  }

  // A bit for each key of a tile.
  [[nodiscard]] __device__ uint32_t* flags() const {
    return reinterpret_cast<uint32_t*>(Shared<T>::pointer(at(T::kFlags)));
  }

  __device__ void init_barriers() const {
    constexpr int kWarps = T::kConsumerThreads / kWarp;
    ptx::mbarrier_init(full_q(), 1);
    ptx::mbarrier_init(empty_q(), kWarps);
    for (int i = 0; i < T::kConsumers; ++i) {
      ptx::mbarrier_init(full_p(i), 1);
      ptx::mbarrier_init(full_sums(i), kWarps / T::kConsumers);
    }
    for (int i = 0; i < T::kSlots; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), kWarps);
    }
    ptx::fence_mbarrier_init();
  }

 private:
  static constexpr int kFirst = 2 + 2 * T::kConsumers;  // barrier of the ring
  static_assert(8 * (kFirst + 2 * T::kSlots) <= T::kFlags - T::kControl);

  // Addresses are cheap beside the registers that they would keep.
  [[nodiscard]] __device__ uint32_t at(int offset) const { return recomputed(this->base) + offset; }
  [[nodiscard]] __device__ uint32_t barrier(int i) const { return at(T::kControl + 8 * i); }
};

}  // namespace pfa::cuda::sm90
