// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp's rows, in powers of two: p = 2^((s - max) * unit).
//
// Scores stay in the unit in which they were computed, whose worth in powers of two is `unit` > 0.
// A thread keeps two rows of each 16-row fragment (accumulator_row) and shares them with the three
// other lanes of its quad. row_max is the same in all four; row_sum is the thread's own part until
// finalise() adds them up. P is never rounded before it is summed.
#pragma once

#include "fragment.cuh"
#include "params.h"
#include "sm80/ptx.cuh"

namespace pfa::cuda {

constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Of a row whose statistics are final: natural logarithm of the sum of exp(score). lg2.approx is
// off by at most 2^-22.
__device__ __forceinline__ float log_sum_exp(float row_max, float row_sum, float unit) {
  constexpr float kLn2 = 0.693147181f;
  return row_sum == 0.0f ? -kInfinity : fmaf(row_max, unit, __log2f(row_sum)) * kLn2;
}

// Row: of (batch, num_heads, seqlen_q).
__device__ __forceinline__ void store_lse(const Params& p, int64_t row, bool is_valid,
                                          float row_max, float row_sum, float unit) {
  p.lse[row] = is_valid ? log_sum_exp(row_max, row_sum, unit) : -kInfinity;
}

template <int kMmaM>
struct Softmax {
  float row_max[kMmaM][2];
  float row_sum[kMmaM][2];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        row_max[m][r] = -kInfinity;
        row_sum[m][r] = 0.0f;
      }
    }
  }

  // The largest element of each row over the quad.
  template <int kTiles>
  __device__ static void tile_max(const float (&s)[kMmaM][kTiles][4], float (&most)[kMmaM][2]) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < kTiles; ++n) {
          x = fmaxf(x, s[m][n][2 * r]);
          x = fmaxf(x, s[m][n][2 * r + 1]);
        }
        most[m][r] = quad_max(x);
      }
    }
  }

  // Takes the maxima of a tile; returns what the sums so far are worth now. A row without a visible
  // key keeps -inf, and subtracting it from itself would give NaN: base is 0 for such a row, so
  // that every p is 2^-inf = 0.
  __device__ void update_max(const float (&most)[kMmaM][2], float unit, float (&alpha)[kMmaM][2],
                             float (&base)[kMmaM][2]) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = row_max[m][r];
        row_max[m][r] = fmaxf(before, most[m][r]);
        base[m][r] = row_max[m][r] == -kInfinity ? 0.0f : row_max[m][r];
        alpha[m][r] = ptx::exp2_approx((before - base[m][r]) * unit);
        row_sum[m][r] *= alpha[m][r];
      }
    }
  }

  // s becomes p, and is added to sums.
  //
  // kExact subtracts before it multiplies, at one more instruction: integer scores in the millions
  // keep their differences, and a bias of the lowest finite float does not overflow.
  template <bool kExact, int kTiles>
  __device__ static void exponentiate(float (&s)[kMmaM][kTiles][4], float unit,
                                      const float (&base)[kMmaM][2], float (&sums)[kMmaM][2]) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float offset = -base[m][r] * unit;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            const float exponent =
                kExact ? (s[m][n][e] - base[m][r]) * unit : fmaf(s[m][n][e], unit, offset);
            s[m][n][e] = ptx::exp2_approx(exponent);
            sums[m][r] += s[m][n][e];
          }
        }
      }
    }
  }

  __device__ void finalise() {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum[m][r] = quad_sum(row_sum[m][r]);
    }
  }
};

}  // namespace pfa::cuda
