// SPDX-License-Identifier: Apache-2.0
// The online softmax of a warp's 16 rows over integer scores, and P in int8.
//
// Up to head_dim 256 sums of Q K^T start from the bits of kZero (scores.cuh), so that they are
// floats when they end and nothing is converted. P is rounded in steps of the row's true maximum so
// far, as the contract has it: each tile takes its maximum first.
//
// An exponent is (score - maximum) * unit + shift. Fused, one multiplication and addition computes
// score * unit + offset, where offset = shift - maximum * unit has to be rounded, at a magnitude of
// hundreds: that alone would multiply all P of a row by up to 1 + 4e-5, which shows. So a row gets
// the unit, of those a few ulps above the real one, whose offset happens to be nearly a float.
#pragma once

#include "../quant.cuh"
#include "../softmax.cuh"
#include "scores.cuh"

namespace pfa::cuda::sm90 {

template <class T>
class IntegerSoftmax : public Softmax<1> {
  static constexpr int kChains = 4;  // of maxima, which do not wait for each other
  static constexpr bool kComparesFloats = T::kHasBias || !kMagicSums<T>;

 public:
  __device__ explicit IntegerSoftmax(const Params& p) : p_(p) {
    // Integers that differ do so by 1: beyond this unit nothing changes but what overflows.
    constexpr float kMostUnit = 64.0f;
    unit_ = T::kHasBias ? score_unit(p) : fminf(score_unit(p), kMostUnit);
    const float scale = read_scale(p.quant.scale_p);
    // The exponential is off by a millionth, which would break a tie of the largest p.
    const float distance = fabsf(scale - truncf(scale) - 0.5f);
    const bool folds = scale >= 1.0f && scale <= 127.0f && distance > 0.001f;
    shift_ = folds ? log2f(scale) - 24.0f : 0.0f;
    if (folds && unit_ > kLeastFused && unit_ < kMostFused) plan_fusing();
  }

  // For the next block.
  __device__ void clear() {
    Softmax<1>::clear();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[0][r] = kNoScore;
      separate(r);
    }
    is_fused_ = !kMagicSums<T> && steps_ != 0.0f ? 1 : 0;
  }

  // Takes the maxima of a tile. Returns whether one has changed: alpha is then what the sums so far
  // are worth now. The first half of s becomes p: see pack().
  template <int kTiles>
  __device__ __forceinline__ int step(Scores<T, kTiles>& s, float (&alpha)[1][2]) {
    float before[2];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      before[r] = row_max[0][r];
      row_max[0][r] = fmaxf(before[r], tile_max(s[0], r));
      grown |= row_max[0][r] != before[r];
    }
    const int changed = __any_sync(0xffffffffu, grown);
    if (changed != 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        alpha[0][r] = ptx::exp2_approx((before[r] - base(r)) * unit_);
        row_sum[0][r] *= alpha[0][r];
      }
      fuse();
    }
    if (is_fused()) {
      exponentiate<true, 0>(s);
    } else {
      exponentiate<false, 0>(s);
    }
    return changed;
  }

  // The second half of s becomes p while the first is packed: exponentials and integers keep
  // different units of the GPU busy. Folded: the exponent counts P in units of float16's smallest
  // subnormal, and the conversion to float16, two at a time, rounds.
  template <int kTiles>
  __device__ __forceinline__ void pack(Scores<T, kTiles>& s, Probabilities<T>& p) {
    if (is_fused()) {
      exponentiate<true, kTiles / 2>(s);
      fold(p, s);
    } else if (folds()) {
      exponentiate<false, kTiles / 2>(s);
      fold(p, s);
    } else {
      exponentiate<false, kTiles / 2>(s);
      round(p, s);
    }
  }

  // Sums of p itself, and maxima of sums.
  __device__ void finalise() {
    const float unit = ptx::exp2_approx(-shift_);
    Softmax<1>::finalise();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[0][r] *= unit;
      if constexpr (!T::kHasBias) {
        row_max[0][r] = row_max[0][r] == kNoScore ? -kInfinity : row_max[0][r] - kZero<T>;
      }
    }
  }

 private:
  // Below all scores. Those without a bias are at least kZero - 2^22, or -2^23 if they do not start
  // from there.
  static constexpr float kNoScore = T::kHasBias ? -kInfinity : kMagicSums<T> ? 0.0f : -16777216.0f;

  // By how many powers of two an offset may be off: P is multiplied by at most 1.1e-5 more.
  static constexpr float kMostLost = 1.0f / 65536;
  // An ulp of the unit moves an offset by 5/4 of an ulp of the offset, or by 5/8 where those are
  // twice as large; by 3/2 and 3/4 where sums start from kMagic. 1/4, or 1/2, is a step; or half.
  static constexpr int kSteps = T::kHeadDim <= 128 ? 4 : 2;
  // Below this the nearest multiple of a step leaves kMostLost at most. Sums that start from 0 need
  // none: there no offset, of which shift_ may be 24, is beyond 512.
  static constexpr float kMostFused =
      kMagicSums<T> ? kSteps / 16384.0f : 488.0f / (128 * 128 * T::kHeadDim);
  static constexpr float kLeastFused = 1.0f / 131072;
  static constexpr float kFused = -64.0f;  // fused offsets from kZero are less, and shift_ is more

  [[nodiscard]] __device__ bool folds() const { return shift_ != 0.0f; }
  [[nodiscard]] __device__ bool is_fused() const { return !T::kHasBias && is_fused_ != 0; }
  [[nodiscard]] __device__ bool fuses(int r) const { return offsets_[r] < kFused; }

  [[nodiscard]] __device__ float base(int r) const {
    return T::kHasBias && row_max[0][r] == -kInfinity ? 0.0f : row_max[0][r];
  }

  __device__ void plan_fusing() {
    const float offset = kZero<T> * unit_ - shift_;
    const int exponent = __float_as_int(offset) >> 23;
    const bool doubles = exponent - (__float_as_int(unit_) >> 23) == 24;
    const float ulp = __int_as_float((exponent - 23) << 23);
    steps_ = doubles ? -2.0f * kSteps / ulp : kSteps / ulp;
  }

  // For new maxima. A row is fused or not whatever its neighbours are, and has the same P in either
  // form of the loop; the one that subtracts nothing is for warps whose rows all are, or have no
  // score.
  __device__ void fuse() {
    if (T::kHasBias || steps_ == 0.0f) return;
    if constexpr (kMagicSums<T>) {
      bool fits = true;
      // How many ulps make one step: of 5/4 it is 1, of 5/8 5; and 1 and 3.
      const bool doubles = steps_ < 0.0f;
      const unsigned steps = doubles ? 2 * kSteps : kSteps, ulps = doubles ? kSteps + 1 : 1;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float left = lost(r, unit_, fmaf(-base(r), unit_, shift_));
        const unsigned nearest = __float_as_uint(fmaf(left, fabsf(steps_), kMagic));
        units_[r] = __uint_as_float(__float_as_uint(unit_) + nearest * ulps % steps);
        offsets_[r] = fmaf(-base(r), units_[r], shift_);
        if (fabsf(lost(r, units_[r], offsets_[r])) > kMostLost) separate(r);
        fits &= fuses(r) || row_max[0][r] == kNoScore;
      }
      is_fused_ = __all_sync(0xffffffffu, fits);
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) offsets_[r] = fmaf(-base(r), unit_, shift_);
    }
  }
  __device__ void separate(int r) {
    units_[r] = unit_;
    offsets_[r] = shift_;
  }
  // What the rounding of an offset took from it.
  [[nodiscard]] __device__ float lost(int r, float unit, float offset) const {
    return fmaf(-base(r), unit, -offset) + shift_;
  }

  // Half of a tile.
  template <bool kIsFused, int kFirst, int kTiles>
  __device__ __forceinline__ void exponentiate(Scores<T, kTiles>& s) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float subtracted = kMagicSums<T> && !T::kHasBias && fuses(r) ? 0.0f : base(r);
      float sum;
#pragma unroll
      for (int n = kFirst; n < kFirst + kTiles / 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          Score<T>& score = s[0][n][2 * r + c];
          const float x = kIsFused ? get(score) : get(score) - subtracted;
          const float p = ptx::exp2_approx(fmaf(x, units_[r], offsets_[r]));
          sum = n == kFirst && c == 0 ? p : sum + p;
          set(score, p);
        }
      }
      row_sum[0][r] += sum;
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void fold(Probabilities<T>& p, Scores<T, kTiles>& s) {
    pack(p, s, [](float a, float b, float c, float d) {
      return __byte_perm(Float16::pack(a, b), Float16::pack(c, d), 0x6420);
    });
  }
  template <int kTiles>
  __device__ __forceinline__ void round(Probabilities<T>& p, Scores<T, kTiles>& s) {
    const float scale = read_scale(p_.quant.scale_p);
    pack(p, s, [scale](float a, float b, float c, float d) {
      return quant::pack4<true>(a, b, c, d, scale);
    });
  }

  template <int kTiles, class Pack4>
  __device__ __forceinline__ static void pack(Probabilities<T>& p, Scores<T, kTiles>& s,
                                              const Pack4& pack4) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {  // 16 keys
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Score<T>*low = &s[0][n][2 * r], *high = &s[0][n + 1][2 * r];
        p[n / 4][n % 4 + r] = pack4(get(low[0]), get(low[1]), get(high[0]), get(high[1]));
        if constexpr (kBeginsAgain<T>) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            begin_again(low[c]);
            begin_again(high[c]);
          }
        }
      }
    }
  }

  // From p to the bits of kZero, by arithmetic and here: a constant would be moved there just
  // before the next products, which would wait for it, at half the rate.
  __device__ __forceinline__ static void begin_again(int32_t& score) {
    asm volatile(
        "{\n"
        ".reg .f32 p;\n"
        "mov.b32 p, %0;\n"
        "fma.rn.f32 p, p, 0f00000000, %1;\n"
        "mov.b32 %0, p;\n"
        "}\n"
        : "+r"(score)
        : "f"(kZero<T>));
  }

  // The largest score of a row over the quad. Floats that start from kMagic, of which all but -inf
  // are positive, compare as integers do, of which the GPU takes three at a time.
  template <int kTiles>
  __device__ __forceinline__ static float tile_max(const Score<T> (&s)[kTiles][4], int r) {
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
    for (int n = 0; n < kTiles; ++n) {
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
  float steps_ = 0.0f;  // in a power of two, negative where ulps are twice as large; 0: none
  float units_[2], offsets_[2];
  int is_fused_ = 0;  // the warp
};

}  // namespace pfa::cuda::sm90
