// SPDX-License-Identifier: Apache-2.0
// What happens to a warp's 16 rows of S between the product and the softmax: sign, bias, masks. A
// score that does not take part becomes -inf.
#pragma once

#include "../softmax.cuh"
#include "block.cuh"

namespace pfa::cuda::sm90 {

// Floats, of int8 by their bits: the registers that integer products end in.
template <class T>
using Score = typename T::Element::Sum;
template <class T, int kTiles = T::kTilesS>
using Scores = Score<T>[1][kTiles][4];
// The A operand of P V.
template <class T>
using Probabilities = uint32_t[T::kSteps][4];

// The scores of a tile's first keys.
template <class T, int kTiles>
__device__ __forceinline__ Scores<T, kTiles>& narrow(Scores<T>& s) {
  return reinterpret_cast<Scores<T, kTiles>&>(s);
}

__device__ __forceinline__ float get(float score) { return score; }
__device__ __forceinline__ float get(int32_t score) { return __int_as_float(score); }
__device__ __forceinline__ void set(float& score, float x) { score = x; }
__device__ __forceinline__ void set(int32_t& score, float x) { score = __float_as_int(x); }

// Sums of int8 products start from the bits of kZero, so that they are floats when they end, where
// they stay below 2^22; those of longer rows reach 2^23 and are converted. Neighbouring floats are
// 1 apart there as at kMagic (quant.cuh). Up to head_dim 128 sums stay below 2^21 and may start
// lower: see int8_softmax.cuh.
template <class T>
constexpr bool kMagicSums = quant::Of<typename T::Element>::kIsInteger && T::kHeadDim <= 256;
template <class T>
constexpr int kBelowMagic = T::kHeadDim <= 128 ? 1 << 21 : 0;
template <class T>
constexpr int32_t kZeroBits = kMagicBits - kBelowMagic<T>;
// Whether packing probabilities leaves sums as they start. A bias may be NaN, and so p.
template <class T>
constexpr bool kBeginsAgain = kMagicSums<T> && !T::kHasBias;
// The score of a sum of zero.
template <class T>
constexpr float kZero = kMagicSums<T> ? kMagic - kBelowMagic<T> : 0.0f;

// Before products are added.
template <class T, int kTiles>
__device__ __forceinline__ void begin(Scores<T, kTiles>& s) {
  if constexpr (kMagicSums<T>) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = kZeroBits<T>;
    }
  }
}

// The consumer warp's first row in the block, and its first channel of O.
__device__ __forceinline__ int first_row() {
  return static_cast<int>((recomputed(threadIdx.x) - kWarpgroup) / kWarp) * 16;
}
template <class T>
__device__ __forceinline__ int first_channel() {
  return T::kSlices == 1 ? 0 : static_cast<int>(blockIdx.x % T::kSlices) * T::kColumns;
}

template <class T>
class ScoreStep {
  using Element = Half<typename T::Element>;  // of the bias
  static constexpr bool kIsInteger = quant::Of<typename T::Element>::kIsInteger;

 public:
  // How softmax.cuh is to subtract.
  static constexpr bool kExact = T::kHasBias;
  static constexpr int kWords = (T::kBlockN + kMaskKeys - 1) / kMaskKeys;
  using Bits = uint32_t[kWords];

  __device__ explicit ScoreStep(const Params& p) : p_(p) {
    if constexpr (kIsInteger && T::kHasBias) scale_ = real_scale(p);
  }

  // What one unit of the scores is worth in powers of two.
  [[nodiscard]] __device__ float unit() const { return p_.score_unit; }

  // A negative scale moves its sign to the sums, so that the largest score has the largest
  // probability; those with a bias are real scores.
  [[nodiscard]] __device__ static bool moves_sign(const Params& p) {
    return !T::kHasBias && real_scale(p) < 0.0f;
  }
  template <int kTiles>
  __device__ __forceinline__ void apply_sign(Scores<T, kTiles>& s) const {
    if (!moves_sign(p_)) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) set(s[0][n][e], 2.0f * kZero<T> - get(s[0][n][e]));
    }
  }

  // Sums that are no floats yet, all at once: some would be in registers twice.
  template <int kTiles>
  __device__ __forceinline__ static void convert(Scores<T, kTiles>& s) {
    if constexpr (kIsInteger && !kMagicSums<T>) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) set(s[0][n][e], static_cast<float>(s[0][n][e]));
      }
      hold(s[0]);
    }
  }

  // careful: NaN that a masking bias meets does not count.
  __device__ void add_bias(Scores<T>& s, uint32_t bias, bool careful) const {
    constexpr int kChunks = T::kBiasColumns * 2 / kChunkBytes, kTiles = T::kBiasColumns / 8;
    const LaneAddress lane = lane_address_rows16(static_cast<int>(threadIdx.x % kWarp));
    const LaneCursor<kChunks> cursor{
        bias + static_cast<uint32_t>(chunk_offset<kChunks>(first_row() + lane.row, lane.chunk))};
#pragma unroll
    for (int n = 0; n < T::kTilesS; n += 2) {
      uint32_t r[4];  // rows 0..7 and 8..15 of tile n, then of tile n + 1
      const LaneCursor<kChunks> box{cursor.corner + n / kTiles * T::kBoxBias};
      ptx::ldmatrix_x4(r, box.at(0, n % kTiles));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = Element::unpack(r[i]);
        Score<T>* pair_s = &s[0][n + i / 2][i % 2 * 2];
        if (careful && pair.x == -kInfinity) set(pair_s[0], 0.0f);
        if (careful && pair.y == -kInfinity) set(pair_s[1], 0.0f);
        set(pair_s[0], fmaf(sum(pair_s[0]), scale(), pair.x));
        set(pair_s[1], fmaf(sum(pair_s[1]), scale(), pair.y));
      }
    }
  }

  // Tile n, which the left or the right edge of the band crosses, or both.
  template <int kTiles>
  __device__ __forceinline__ void mask_band(Scores<T, kTiles>& s, const Sequence& sequence, int n,
                                            bool left, bool right) const {
    const int lane = static_cast<int>(recomputed(threadIdx.x) % kWarp);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const mask::Columns columns = mask::columns_of_row(
          sequence, first_row() + accumulator_row(lane, 2 * r), n * T::kBlockN, T::kBlockN);
      const int first = columns.first - accumulator_column(lane, 0);
      const int last = columns.last - accumulator_column(lane, 0);
      const auto for_all = [&](auto mask) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) mask(s[0][i][2 * r + c], 8 * i + c);
        }
      };
      if (left)
        for_all([=](Score<T>& x, int column) { mask_if_less(x, column, first, n, column); });
      if (right)
        for_all([=](Score<T>& x, int column) { mask_if_less(x, last - 1, column, n, column); });
    }
  }

  // The words of the packed mask for this warp's rows and the keys of tile n. Cells beyond the
  // last key do not exist; the band masks what they would have.
  __device__ void load_bits(Bits& bits, const Work<T>& work, int n) const {
    static_assert(!T::kIsDense || T::kBlockN % kMaskKeys == 0);
    const PackedMaskParams& packed = p_.mask;
    const int64_t cell = static_cast<int64_t>(n) * kWords;
    const int64_t row_group = (work.sequence.row_begin + first_row()) / kMaskRows;
    const uint32_t* words = packed.bits + work.b * packed.bits_batch +
                            row_group * packed.bits_row_group + cell * kWarp + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const bool exists = (cell + i) * kMaskKeys < p_.seqlen_k;
      bits[i] = exists ? words[i * kWarp] : ~0u;
    }
  }

  __device__ void mask_bits(Scores<T>& s, const Bits& bits, int n) const {
#pragma unroll
    for (int i = 0; i < T::kTilesS; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t bit = 1u << bit_of(i % (kMaskKeys / 8), e);
        mask_if_set(s[0][i][e], bits[i / (kMaskKeys / 8)] & bit, n, 4 * i + e);
      }
    }
  }

 private:
  // Of products, and what it is worth as a real score.
  [[nodiscard]] __device__ static float sum(float score) { return score; }
  [[nodiscard]] __device__ static float sum(int32_t score) { return get(score) - kZero<T>; }
  [[nodiscard]] __device__ float scale() const { return kIsInteger ? scale_ : p_.softmax_scale; }

  // A masked score becomes -inf by arithmetic: selecting it would keep the pipe busy that integers
  // and the maximum need. The tile's number has the bits of a small float; column differs between
  // scores, lest the compiler computes -inf once and selects it.
  __device__ static void mask_if_less(float& x, int a, int b, int tile, int column) {
    asm("{\n"
        ".reg .pred masked;\n"
        "setp.lt.s32 masked, %1, %2;\n"
        "@masked fma.rn.f32 %0, %3, %4, 0fFF800000;\n"
        "}\n"
        : "+f"(x)
        : "r"(a), "r"(b), "f"(__int_as_float(tile)), "f"(static_cast<float>(column + 1)));
  }
  __device__ static void mask_if_set(float& x, uint32_t bits, int tile, int column) {
    asm("{\n"
        ".reg .pred masked;\n"
        "setp.ne.u32 masked, %1, 0;\n"
        "@masked fma.rn.f32 %0, %2, %3, 0fFF800000;\n"
        "}\n"
        : "+f"(x)
        : "r"(bits), "f"(__int_as_float(tile)), "f"(static_cast<float>(column + 1)));
  }

  __device__ static void mask_if_less(int32_t& x, int a, int b, int tile, int column) {
    float score = get(x);
    mask_if_less(score, a, b, tile, column);
    set(x, score);
  }
  __device__ static void mask_if_set(int32_t& x, uint32_t bits, int tile, int column) {
    float score = get(x);
    mask_if_set(score, bits, tile, column);
    set(x, score);
  }

  const Params& p_;
  float scale_;  // of integers, which may lie in memory
};

}  // namespace pfa::cuda::sm90
