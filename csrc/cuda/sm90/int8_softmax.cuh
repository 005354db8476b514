// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp's 16 rows over integer scores, and P in int8.
//
// Up to head_dim 256 sums of Q K^T start from the bits of kMagic (quant.cuh), so that they are
// floats when they end and nothing is converted. P is rounded in steps of the row's true maximum so
// far, as the contract has it: each tile takes its maximum first.
#pragma once

#include "../quant.cuh"
#include "../softmax.cuh"
#include "scores.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class IntegerSoftmax : public Softmax<1> {
  static constexpr int kTilesS = T::kTilesS;
  static constexpr int kChains = 4;  // of maxima, which do not wait for each other
  static constexpr bool kComparesFloats = T::kHasBias || !kMagicSums<T>;
  // The magnitude that scores without a bias may have.
  static constexpr float kMostScore = kMagicSums<T> ? kMagic : 128.0f * 128.0f * T::kHeadDim;

 public:
  using Probabilities = uint32_t[T::kSteps][4];

  __device__ explicit IntegerSoftmax(const Params& p) : p_(p) {
    // Integers that differ do so by 1: beyond this unit nothing changes but what overflows.
    constexpr float kMostUnit = 64.0f;
    unit_ = T::kHasBias ? score_unit(p) : fminf(score_unit(p), kMostUnit);
    const float scale = read_scale(p.quant.scale_p);
    // The exponential is off by a millionth, which would break a tie of the largest p.
    const float distance = fabsf(scale - truncf(scale) - 0.5f);
    folds_ = scale >= 1.0f && scale <= 127.0f && distance > 0.001f;
    fuses_ = folds_ && !T::kHasBias && kMostScore * unit_ <= kMostOffset;
    shift_ = folds_ ? log2f(scale) - 24.0f : 0.0f;
  }

  // Before the products are added.
  __device__ static void begin(Scores<T>& s) {
#pragma unroll
    for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = kMagicBits;
    }
  }

  // Takes the maxima of a tile. Returns whether one has changed: alpha is then what the sums so far
  // are worth now. The first half of s becomes p: see pack().
  __device__ int step(Scores<T>& s, float (&alpha)[1][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = row_max[0][r];
      row_max[0][r] = fmaxf(before, tile_max(s[0], r));
      alpha[0][r] = ptx::exp2_approx((before - base(r)) * unit_);
      row_sum[0][r] *= alpha[0][r];
    }
    const bool grown = alpha[0][0] != 1.0f || alpha[0][1] != 1.0f;
    if (fuses_) {
      exponentiate<true, 0>(s);
    } else {
      exponentiate<false, 0>(s);
    }
    return __any_sync(0xffffffffu, grown);
  }

  // The second half of s becomes p while the first is packed: exponentials and integers keep
  // different units of the GPU busy. Folded: the exponent counts P in units of float16's smallest
  // subnormal, and the conversion to float16, two at a time, rounds.
  __device__ void pack(Scores<T>& s, Probabilities& p) {
    const auto fold = [](float a, float b, float c, float d) {
      return __byte_perm(Float16::pack(a, b), Float16::pack(c, d), 0x6420);
    };
    if (fuses_) {
      exponentiate<true, kTilesS / 2>(s);
      pack(p, s, fold);
    } else if (folds_) {
      exponentiate<false, kTilesS / 2>(s);
      pack(p, s, fold);
    } else {
      exponentiate<false, kTilesS / 2>(s);
      const float scale = read_scale(p_.quant.scale_p);
      pack(p, s, [scale](float a, float b, float c, float d) {
        return quant::pack4<true>(a, b, c, d, scale);
      });
    }
  }

  // Sums of p itself, and maxima of sums.
  __device__ void finalise() {
    const float unit = ptx::exp2_approx(-shift_);
    Softmax<1>::finalise();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[0][r] *= unit;
      if constexpr (!T::kHasBias) row_max[0][r] -= kZero<T>;
    }
  }

 private:
  // Below this neighbouring floats are at most 2^-15 apart.
  static constexpr float kMostOffset = 512.0f;

  [[nodiscard]] __device__ float base(int r) const {
    return row_max[0][r] == -kInfinity ? 0.0f : row_max[0][r];
  }

  // Fused, the maximum and the shift are one offset of a fused multiplication and addition. At the
  // magnitude of kMagic it is rounded, which multiplies p of a row by 2^(2^-16) at most: sums take
  // that back, and only of P that lie so close to a half another integer is made.
  template <bool kFuses, int kFirst>
  __device__ void exponentiate(Scores<T>& s) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = fmaf(-base(r), unit_, shift_), subtracted = base(r);
      const float lost = fmaf(-subtracted, unit_, -offset) + shift_;
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = kFirst; n < kFirst + kTilesS / 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          Score<T>& score = s[0][n][2 * r + c];
          const float x = kFuses ? get(score) : get(score) - subtracted;
          const float p = ptx::exp2_approx(fmaf(x, unit_, kFuses ? offset : shift_));
          sums[c] += p;
          set(score, p);
        }
      }
      const float sum = sums[0] + sums[1];
      row_sum[0][r] =
          kFuses ? fmaf(sum, ptx::exp2_approx(lost), row_sum[0][r]) : row_sum[0][r] + sum;
    }
  }

  template <class Pack4>
  __device__ static void pack(Probabilities& p, const Scores<T>& s, const Pack4& pack4) {
#pragma unroll
    for (int n = 0; n < kTilesS; n += 2) {  // 16 keys
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Score<T>*low = &s[0][n][2 * r], *high = &s[0][n + 1][2 * r];
        p[n / 4][n % 4 + r] = pack4(get(low[0]), get(low[1]), get(high[0]), get(high[1]));
      }
    }
  }

  // The largest score of a row over the quad. Floats that start from kMagic, of which all but -inf
  // are positive, compare as integers do, of which the GPU takes three at a time.
  __device__ static float tile_max(const Score<T> (&s)[kTilesS][4], int r) {
    using Word = std::conditional_t<kComparesFloats, float, int32_t>;
    const auto word = [](int32_t bits) {
      if constexpr (kComparesFloats) {
        return get(bits);
      } else {
        return bits;
      }
    };
    Word x[kChains];
#pragma unroll
    for (int n = 0; n < kTilesS; ++n) {
      Word& chain = x[n % kChains];
      const Word low = word(s[n][2 * r]), high = word(s[n][2 * r + 1]);
      chain = n < kChains ? larger(low, high) : larger(larger(chain, low), high);
    }
    const Word most = larger(larger(x[0], x[1]), larger(x[2], x[3]));
    if constexpr (kComparesFloats) {
      return quad_max(most);
    } else {
      return quad_max(get(most));
    }
  }
  __device__ static int larger(int a, int b) { return max(a, b); }
  __device__ static float larger(float a, float b) { return fmaxf(a, b); }

  const Params& p_;
  float unit_, shift_;
  bool folds_, fuses_;
};

}  // namespace pfa::cuda::sm90
