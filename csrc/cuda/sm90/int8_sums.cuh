// SPDX-License-Identifier: Apache-2.0
// Integer sums of P V of a warp's 16 rows.
//
// They are exact while no maximum of a row grows. Where one does, they are rounded to whole
// units, of which one of V has quant_scale1: less than what the rounding of one P is worth.
#pragma once

#include "scores.cuh"

namespace pfa::cuda::sm90 {

// They are counted from 2^31, so that they are positive as unsigned integers. No sum has the bits
// of a zero of float: a block without a tile is stored as it is.
constexpr int32_t kNoSum = INT32_MIN;

template <int kTiles>
__device__ __forceinline__ void clear(int32_t (&acc)[1][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][n][e] = kNoSum;
  }
}

// alpha is at most 1, of a row whose maximum has not grown 1: then nothing changes. It becomes a
// fraction of 2^32, an odd one: of the 2^31 that sums are counted from, it leaves a half behind
// the point, so that cutting off rounds.
template <int kTiles>
__device__ __forceinline__ void rescale(int32_t (&acc)[1][kTiles][4], const float (&alpha)[1][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!__any_sync(0xffffffffu, alpha[0][r] != 1.0f)) continue;
    const uint32_t fraction = __float2uint_rz(alpha[0][r] * 4294967296.0f) | 1;
    const uint32_t lost = static_cast<uint32_t>(kNoSum) - (fraction >> 1);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        asm("mad.hi.u32 %0, %0, %1, %2;" : "+r"(acc[0][n][e]) : "r"(fraction), "r"(lost));
      }
    }
  }
}

// Floats hold sums of any length.
struct NoCarriedSums {
  template <class... Any>
  __device__ static void begin(const Any&...) {}
  [[nodiscard]] __device__ static int next() { return INT_MAX; }
  template <class... Any>
  __device__ static void rescale(const Any&...) {}
  template <class... Any>
  __device__ static void take(const Any&...) {}
  template <class... Any>
  __device__ static void finish(const Any&...) {}
};

// Sums of tiles so far back that int32 would not hold them with later ones. They lie in memory of
// the thread: only rows of more than 2^16 keys have any.
template <int kTiles, int kKeys>
class CarriedSums {
 public:
  __device__ CarriedSums() { asm volatile("" ::"l"(sums_) : "memory"); }

  // For a block of work whose first tile this is.
  __device__ void begin(int tile) {
    next_ = tile + kMostTiles;
    any_ = false;
  }
  // The tile at which there may be something to take().
  [[nodiscard]] __device__ int next() const { return next_; }

  // With the next tile's maxima.
  __device__ void rescale(const float (&alpha)[1][2]) {
    if (!any_) return;
    for_all([&](int n, int e) { sums_[4 * n + e] *= alpha[0][e / 2]; });
  }
  // Before the products of the tile before this one are added.
  __device__ void take(int32_t (&acc)[1][kTiles][4], int tile) {
    if (tile < next_) return;
    next_ = tile - 1 + kMostTiles;
    for_all([&](int n, int e) {
      sums_[4 * n + e] = (any_ ? sums_[4 * n + e] : 0.0f) + sum(acc[0][n][e]);
    });
    clear(acc);
    any_ = true;
  }
  // All sums, as floats in the same registers.
  __device__ void finish(int32_t (&acc)[1][kTiles][4]) const {
    for_all([&](int n, int e) { set(acc[0][n][e], sum(acc[0][n][e])); });
    if (!any_) return;
    for_all([&](int n, int e) { set(acc[0][n][e], get(acc[0][n][e]) + sums_[4 * n + e]); });
  }

 private:
  // Of 2^16 keys, whose products add up to 128 * 128 * 2^16 < 2^31.
  static constexpr int kMostTiles = (1 << 16) / kKeys;

  __device__ static float sum(int32_t counted) { return static_cast<float>(counted ^ kNoSum); }

  template <class Visit>
  __device__ static void for_all(const Visit& visit) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(n, e);
    }
  }

  float sums_[4 * kTiles];
  int next_;  // the first tile before which sums are taken
  bool any_;
};

}  // namespace pfa::cuda::sm90
