// SPDX-License-Identifier: Apache-2.0
// O of a tile: P becomes the element type and is multiplied with V.
#pragma once

#include "warp.cuh"

namespace pfa::cuda::sm80 {

template <class T>
class ValueStep {
  using Element = typename T::Element;
  using Scores = typename Warp<T>::Scores;
  using Output = typename Warp<T>::Output;
  using RowValues = typename Warp<T>::RowValues;
  static constexpr bool kIsInteger = T::Quant::kIsInteger;
  static constexpr bool kSharesRows = T::kWarpsN > 1;
  static constexpr int kMmaM = T::kMmaM, kTilesS = T::kTilesS, kTilesO = T::kTilesO;
  static constexpr int kRowChunks = T::kRowChunks, kBlockN = T::kBlockN;

 public:
  __device__ ValueStep(const Params& p, const Warp<T>& warp) : warp_(warp) {
    if constexpr (kIsInteger) {
      scale_p_ = read_scale(p.quant.scale_p);
      saturate_ = !(fabsf(scale_p_) <= 127.0f);
    }
  }

  // o = alpha o + p v. Integers count in units of quant.descale_o.
  __device__ void multiply(Output& o, const Scores& p, const RowValues& alpha) const {
    if constexpr (kIsInteger) {
      multiply_integers(o, p, alpha);
    } else {
      multiply_floats(o, p, alpha);
    }
  }

 private:
  // Skipped where no maximum of the warp's rows has grown: multiplying by 1 changes nothing.
  __device__ static void rescale(Output& o, const RowValues& alpha) {
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) grown |= alpha[m][0] != 1.0f || alpha[m][1] != 1.0f;
    if (!__any_sync(0xffffffffu, grown)) return;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][n][e] *= alpha[m][e / 2];
      }
    }
  }

  __device__ void multiply_floats(Output& o, const Scores& s, const RowValues& alpha) const {
    constexpr int kSteps = kBlockN / 16;
    if constexpr (kSharesRows) {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int n = 0; n < kTilesS; ++n) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            store_p(m, r, n, Element::pack(s[m][n][2 * r], s[m][n][2 * r + 1]));
          }
        }
      }
      __syncthreads();
    }
    rescale(o, alpha);
    const auto v = warp_.template cursor<kRowChunks>(T::kV, 0, lane_address_rows16(warp_.lane()),
                                                     2 * warp_.index_n());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t p[kMmaM][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
        if constexpr (kSharesRows) {
          load_p(p[m], m, step);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = &s[m][2 * step + i / 2][i % 2 * 2];
            p[m][i] = Element::pack(pair[0], pair[1]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTilesO; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v.at(step * 16, n * T::kWarpsN));
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(o[m][n], p[m], b[0], b[1]);
          Element::mma(o[m][n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }

  // A chunk of P is one accumulator of S, or two of int8.
  __device__ void store_p(int m, int r, int n, uint32_t pair) const {
    const int row = warp_.row() + m * 16 + accumulator_row(warp_.lane(), 2 * r);
    const int chunk = warp_.index_n() * (kTilesS * 8 * Element::kBytes / kChunkBytes) + n;
    char* to = warp_.shared + T::kP + chunk_offset<T::kProbabilityChunks>(row, chunk) +
               warp_.lane() % 4 * 4;
    *reinterpret_cast<uint32_t*>(to) = pair;
  }

  __device__ void load_p(uint32_t (&p)[4], int m, int step) const {
    const auto from = warp_.template cursor<T::kProbabilityChunks>(
        T::kP, warp_.row(), lane_address_rows16(warp_.lane()));
    ptx::ldmatrix_x4(p, from.at(m * 16, 2 * step));
  }

  // Four accumulators of S hold 32 keys, the length of an int8 fragment. Its byte 4 i + {0, 1, 2,
  // 3} of lane i of a quad is key 2 i + {0, 1, 8, 9}; V's fragments below have the same order.
  template <bool kSaturate>
  __device__ void quantise_p(const Scores& s, uint32_t (&p)[kMmaM][kTilesS / 2][2]) const {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesS; n += 2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* low = &s[m][n][2 * r];
          const float* high = &s[m][n + 1][2 * r];
          p[m][n / 2][r] = quant::pack4<kSaturate>(low[0], low[1], high[0], high[1], scale_p_);
        }
      }
    }
  }

  // O = alpha O + P V in float, the product of a tile being exact. ldmatrix transposes pairs of
  // bytes: after separating the even from the odd channels of a chunk, an accumulator's columns
  // are every other channel (see Epilogue).
  __device__ void multiply_integers(Output& o, const Scores& s, const RowValues& alpha) const {
    constexpr int kSteps = kBlockN / 32;
    uint32_t halves[kMmaM][kTilesS / 2][2];  // 16 keys each: two of the four words of a fragment
    if (saturate_) {
      quantise_p<true>(s, halves);
    } else {
      quantise_p<false>(s, halves);
    }
    uint32_t p[kMmaM][kSteps][4];
    if constexpr (kSharesRows) {
      static_assert(kTilesS == 2 && kSteps == 1);
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
        store_p(m, 0, 0, halves[m][0][0]);
        store_p(m, 1, 0, halves[m][0][1]);
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) load_p(p[m][0], m, 0);
    } else {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) p[m][i / 4][i % 4] = halves[m][i / 2][i % 2];
      }
    }
    auto v = warp_.template cursor<kRowChunks>(T::kV, 0, lane_address_rows32(warp_.lane()),
                                               warp_.index_n());
    v.corner = recomputed(v.corner);  // its eight swizzled forms would be spilled
#pragma unroll
    for (int c = 0; c < kTilesO / 2; ++c) {
      int32_t acc[kMmaM][2][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[m][e / 4][e % 4] = kMagicBits;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r, v.at(step * 32, c * T::kWarpsN));
        const uint32_t even0 = __byte_perm(r[0], r[1], 0x6420),
                       even1 = __byte_perm(r[2], r[3], 0x6420);
        const uint32_t odd0 = __byte_perm(r[0], r[1], 0x7531),
                       odd1 = __byte_perm(r[2], r[3], 0x7531);
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          Element::mma(acc[m][0], p[m][step], even0, even1);
          Element::mma(acc[m][1], p[m][step], odd0, odd1);
        }
      }
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& x = o[m][2 * c + e / 4][e % 4];
          x = fmaf(x, alpha[m][e % 4 / 2], __int_as_float(acc[m][e / 4][e % 4]) - kMagic);
        }
      }
    }
  }

  Warp<T> warp_;
  float scale_p_ = 0.0f;
  bool saturate_ = false;
};

}  // namespace pfa::cuda::sm80
