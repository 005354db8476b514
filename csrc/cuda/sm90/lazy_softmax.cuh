// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp's 16 rows without a maximum in most tiles.
//
// What is subtracted from a row's scores need not be their maximum: any value not far from it will
// do, as it cancels in the end. It must not be so small that P overflows, nor so large that all of
// P vanishes. So row_max is the maximum of the first tile in which a row has a key, until a tile's
// probabilities add up to more than kMost, or to kDominant times what came before: a key that has
// nearly all of the row's weight must have a P that 16 bits hold exactly, as it has with the true
// maximum. What even float does not hold becomes an infinity; the block then runs again, carefully.
//
// Warps decide as one where to look, but for each row by itself what to do: no bit of a row depends
// on its neighbours.
#pragma once

#include "../softmax.cuh"

namespace pfa::cuda::sm90 {

class LazySoftmax : public Softmax<1> {
 public:
  __device__ explicit LazySoftmax(const Params&) {}

  __device__ void clear() {
    Softmax<1>::clear();
    looks_ = 1;
  }

  // s becomes p, and is added to the sums. Returns whether row_max may have changed: alpha is then
  // what the sums so far are worth now. is_careful() is asked in a row's first tile: whether to
  // look at each tile before anything becomes an infinity.
  template <bool kExact, int kTiles, class IsCareful>
  __device__ int step(float (&s)[1][kTiles][4], float unit, const IsCareful& is_careful,
                      float (&alpha)[1][2]) {
    float sums[1][2] = {{0.0f, 0.0f}}, base[1][2] = {{row_max[0][0], row_max[0][1]}};
    bool is_new[2] = {false, false};
    int changed = looks_;
    if (changed != 0) {
      find(s, unit, is_new, alpha);
      const bool is_unset[2] = {row_max[0][0] == -kInfinity, row_max[0][1] == -kInfinity};
#pragma unroll
      for (int r = 0; r < 2; ++r) base[0][r] = is_unset[r] ? 0.0f : row_max[0][r];
      looks_ = is_careful() ? 1 : __any_sync(kAllLanes, is_unset[0] || is_unset[1]);
    }
    exponentiate<kExact>(s, unit, base, sums);
    bool demands[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      demands[r] = sums[0][r] > fminf(kDominant * row_sum[0][r], kMost);
    }
    if (__any_sync(kAllLanes, demands[0] || demands[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) demands[r] = demands[r] && !is_new[r];
      if (__any_sync(kAllLanes, demands[0] || demands[1])) {
        if (changed == 0) alpha[0][0] = alpha[0][1] = 1.0f;
        raise(s, unit, demands, sums, alpha);
        changed = 1;
      }
    }
    row_sum[0][0] += sums[0][0];
    row_sum[0][1] += sums[0][1];
    return changed;
  }

 private:
  // Of a lane's part of a tile's row. float16 holds twice as much.
  static constexpr float kMost = 32768.0f, kDominant = 4.0f;
  static constexpr uint32_t kAllLanes = 0xffffffffu;
  // Makes a normal number of the smallest unit: fast division takes no other.
  static constexpr float kNormal = 4294967296.0f;

  // row_max of the rows that have none yet, or one from which float does not reach this tile's.
  template <int kTiles>
  __device__ void find(const float (&s)[1][kTiles][4], float unit, bool (&is_new)[2],
                       float (&alpha)[1][2]) {
    float most[1][2];
    tile_max(s, most);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = row_max[0][r];
      is_new[r] =
          before == -kInfinity || ptx::exp2_approx((most[0][r] - before) * unit) == kInfinity;
      if (is_new[r]) row_max[0][r] = fmaxf(before, most[0][r]);
      const float base = row_max[0][r] == -kInfinity ? 0.0f : row_max[0][r];
      alpha[0][r] = is_new[r] ? ptx::exp2_approx((before - base) * unit) : 1.0f;
      row_sum[0][r] *= alpha[0][r];
    }
  }

  // Of the rows of which a lane demands it, row_max as if this tile had been the first.
  template <int kTiles>
  __device__ void raise(float (&s)[1][kTiles][4], float unit, const bool (&demands)[2],
                        float (&sums)[1][2], float (&alpha)[1][2]) {
    float most[1][2];
    tile_max(s, most);
    const int quad = static_cast<int>(recomputed(threadIdx.x) % kWarp) / 4 * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool raises = (__ballot_sync(kAllLanes, demands[r]) >> quad & 15) != 0;
      const float by = raises ? __log2f(fmaxf(most[0][r], 1.0f)) : 0.0f;
      const float shrink = ptx::exp2_approx(-by);
      row_max[0][r] += __fdividef(by, unit * kNormal) * kNormal;
      alpha[0][r] *= shrink;
      row_sum[0][r] *= shrink;
      float sum = 0.0f;  // once more: it may have been too much for float
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) sum += s[0][n][e] *= shrink;
      }
      if (raises) sums[0][r] = sum;
    }
  }

  int looks_;  // has a row of the warp no key so far?
};

}  // namespace pfa::cuda::sm90
