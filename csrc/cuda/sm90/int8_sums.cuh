// SPDX-License-Identifier: Apache-2.0
// Integer sums of P V of a warp's 16 rows.
//
// They are exact while no maximum of a row grows. Where one does, they are rounded to whole
// units, of which one of V has quant_scale1: less than what the rounding of one P is worth.
#pragma once

#include "scores.cuh"

namespace pfa::cuda::sm90 {

// x * fraction / 2^30, half up.
__device__ __forceinline__ int32_t multiply_fraction(int32_t x, int32_t fraction) {
  int32_t product;
  asm("{\n"
      ".reg .b32 low, high;\n"
      ".reg .b64 sum;\n"
      "mad.wide.s32 sum, %1, %2, %3;\n"
      "mov.b64 {low, high}, sum;\n"
      "shf.l.wrap.b32 %0, low, high, 2;\n"
      "}\n"
      : "=r"(product)
      : "r"(x), "r"(fraction), "l"(int64_t{1} << 29));
  return product;
}

// alpha is at most 1, of a row whose maximum has not grown 1: then nothing changes.
template <int kTiles>
__device__ __forceinline__ void rescale(int32_t (&acc)[1][kTiles][4], const float (&alpha)[1][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!__any_sync(0xffffffffu, alpha[0][r] != 1.0f)) continue;
    const int32_t fraction = __float2int_rz(alpha[0][r] * 1073741824.0f);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        acc[0][n][e] = multiply_fraction(acc[0][n][e], fraction);
      }
    }
  }
}

// Floats hold sums of any length.
struct NoCarriedSums {
  template <class... Any>
  __device__ static void begin(const Any&...) {}
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
  // With the next tile's maxima.
  __device__ void rescale(const float (&alpha)[1][2]) {
    if (!any_) return;
    for_all([&](int n, int e) { sums_[4 * n + e] *= alpha[0][e / 2]; });
  }
  // Before the products of this tile are added.
  __device__ void take(int32_t (&acc)[1][kTiles][4], int tile) {
    if (tile < next_) return;
    next_ = tile + kMostTiles;
    for_all([&](int n, int e) {
      sums_[4 * n + e] = (any_ ? sums_[4 * n + e] : 0.0f) + static_cast<float>(acc[0][n][e]);
      acc[0][n][e] = 0;
    });
    any_ = true;
  }
  // All sums, as floats in the same registers.
  __device__ void finish(int32_t (&acc)[1][kTiles][4]) const {
    for_all([&](int n, int e) {
      const float sum = static_cast<float>(acc[0][n][e]);
      set(acc[0][n][e], any_ ? sum + sums_[4 * n + e] : sum);
    });
  }

 private:
  // Of 2^16 keys, whose products add up to 128 * 128 * 2^16 < 2^31.
  static constexpr int kMostTiles = (1 << 16) / kKeys;

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
