// SPDX-License-Identifier: Apache-2.0
// S of a tile: Q K^T, the bias, the masks. A score that does not take part becomes -inf.
#pragma once

#include "../softmax.cuh"
#include "warp.cuh"

namespace pfa::cuda::sm80 {

template <class T>
class ScoreStep {
  using Element = typename T::Element;
  using BiasElement = Half<Element>;
  using Scores = typename Warp<T>::Scores;
  static constexpr bool kIsInteger = T::Quant::kIsInteger;
  static constexpr int kMmaM = T::kMmaM, kTilesS = T::kTilesS, kRowChunks = T::kRowChunks;
  // Sums below 2^22 start from kMagicBits and so are floats, kMagic too large, when they end.
  static constexpr bool kMagicSums = kIsInteger && T::kHeadDim <= 256;

 public:
  // How softmax.cuh is to subtract.
  static constexpr bool kExact = kIsInteger || T::kHasBias;

  __device__ ScoreStep(const Params& p, const Warp<T>& warp)
      : warp_(warp), scale_(real_scale(p)), unit_(pfa::cuda::score_unit(p)) {}

  // What the scores are too large by.
  __device__ static float offset(const Params& p) {
    if constexpr (!kMagicSums || T::kHasBias) return 0.0f;
    return real_scale(p) < 0.0f ? -kMagic : kMagic;
  }

  // What one unit of the scores is worth in powers of two.
  [[nodiscard]] __device__ float unit() const { return unit_; }

  // Q K^T of positive scale: a negative one has moved its sign to the sums, so that the largest
  // score has the largest probability.
  __device__ void multiply(Scores& s) const {
    typename Element::Sum acc[kMmaM][kTilesS][4];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = kMagicSums ? kMagicBits : 0;
      }
    }
    const auto q =
        warp_.template cursor<kRowChunks>(T::kQ, warp_.row(), lane_address_rows16(warp_.lane()));
    const auto k =
        warp_.template cursor<kRowChunks>(T::kK, warp_.key(), lane_address_pair(warp_.lane()));
#pragma unroll
    for (int step = 0; step < kRowChunks / 2; ++step) {
      uint32_t a[kMmaM][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) ptx::ldmatrix_x4(a[m], q.at(m * 16, 2 * step));
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k.at(n * 8, 2 * step));
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(acc[m][n], a[m], b[0], b[1]);
          Element::mma(acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = score_of(acc[m][n][e]);
      }
    }
    if (!T::kHasBias && scale_ < 0.0f) negate(s);
  }

  // careful: NaN that a masking bias meets does not count.
  __device__ void add_bias(Scores& s, bool careful) const {
    constexpr int kChunks = T::kBiasChunks;
    const auto bias = warp_.template cursor<kChunks>(
        T::kBias, warp_.row(), lane_address_rows16(warp_.lane()), warp_.key() / 8);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
        uint32_t r[4];  // rows 0..7 and 8..15 of tile n, then of tile n + 1
        ptx::ldmatrix_x4(r, bias.at(m * 16, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = BiasElement::unpack(r[i]);
          float* pair_s = &s[m][n + i / 2][i % 2 * 2];
          if (careful && pair.x == -kInfinity) pair_s[0] = 0.0f;
          if (careful && pair.y == -kInfinity) pair_s[1] = 0.0f;
          pair_s[0] = fmaf(pair_s[0], scale_, pair.x);
          pair_s[1] = fmaf(pair_s[1], scale_, pair.y);
        }
      }
    }
  }

  __device__ void mask_band(Scores& s, const Sequence& sequence, int n) const {
    const int64_t tile_begin = static_cast<int64_t>(n) * T::kBlockN;
    const int lane = static_cast<int>(recomputed(threadIdx.x) % kWarp);
    const int first_column = warp_.key() + accumulator_column(lane, 0);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_.row() + m * 16 + accumulator_row(lane, 2 * r);
        const mask::Columns columns = mask::columns_of_row(sequence, row, tile_begin, T::kBlockN);
        const int skipped = columns.first - first_column;
        const auto width = static_cast<unsigned>(max(columns.last - columns.first, 0));
#pragma unroll
        for (int i = 0; i < kTilesS; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const bool keep = static_cast<unsigned>(8 * i + c - skipped) < width;
            if (!keep) s[m][i][2 * r + c] = -kInfinity;
          }
        }
      }
    }
  }

  // The words of the packed mask for this warp's rows, its keys of tile n in the low bits.
  static constexpr int kCells = kTilesS > 8 ? kTilesS / 8 : 1;
  using Bits = uint32_t[kMmaM][kCells];
  __device__ void load_bits(Bits& bits, const PackedMaskParams& packed, int64_t b,
                            const Sequence& sequence, int n) const {
    const int64_t key = static_cast<int64_t>(n) * T::kBlockN + warp_.key();
    const int64_t row_group = (sequence.row_begin + warp_.row()) / kMaskRows;
    const uint32_t* words = packed.bits + b * packed.bits_batch +
                            row_group * packed.bits_row_group + key / kMaskKeys * kWarp +
                            warp_.lane();
    const int first_bit = bit_of(static_cast<int>(key % kMaskKeys) / 8, 0);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        bits[m][cell] = words[m * packed.bits_row_group + cell * kWarp] >> first_bit;
      }
    }
  }

  __device__ void mask_bits(Scores& s, const Bits& bits) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if ((bits[m][n / 8] & (1u << bit_of(n % 8, e))) != 0) s[m][n][e] = -kInfinity;
        }
      }
    }
  }

 private:
  // Integers that only softmax will subtract from each other keep the offset of kMagic.
  __device__ static float score_of(float sum) { return sum; }
  __device__ static float score_of(int32_t sum) {
    if constexpr (!kMagicSums) return static_cast<float>(sum);
    return T::kHasBias ? __int_as_float(sum) - kMagic : __int_as_float(sum);
  }

  __device__ static void negate(Scores& s) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = -s[m][n][e];
      }
    }
  }

  Warp<T> warp_;
  float scale_;  // of a sum, its sign included
  float unit_;
};

}  // namespace pfa::cuda::sm80
