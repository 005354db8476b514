// SPDX-License-Identifier: Apache-2.0
// The fixed-point Dot policy of AVX512_VNNI: int16 pairs.
#pragma once

namespace pfa::cpu::PFA_ISA {

// fp16 attention in 16-bit fixed point: twice the multiply-adds of fp32 FMAs, and closer to the
// exact result than fp16 arithmetic. What is stored of
//   q      is in units of the row's q_step,
//   k      in units of the tile's key_step,
//   v      in units of channel_unit * key_unit, one per channel and one per key of the tile,
//   P      is p * key_unit in units of the strip's row unit.
// Steps and units of q, k and v are powers of two, so the larger operands keep all of fp16's bits;
// attend_tiles_fixed turns to DotF32 wherever what the smaller ones lose could matter. Sums never
// leave int32: |q . k| <= |q| |k| < 2^31, and over a panel |P . v| <= sum(P) max|v| < 2^31.
struct DotI16 {
  using Element = int16_t;
  using Acc = VI;
  using Session = NoSession;
  static constexpr int kPack = 2, kPlanes = 1, kGroupAlign = 1, kDegree = 4;
  static constexpr bool kInt = true, kScaled = true, kUnsignedA = false, kQuantised = false;

  static constexpr float kMaxNorm = 46300.0f;  // sqrt(2^31) less what rounding can add
  static constexpr float kMaxElement = 32767.0f;
  static constexpr float kMaxSumP = 65000.0f;  // times kMaxElement is below 2^31, likewise

  static PFA_INLINE Acc zero() { return isplat(0); }
  static PFA_INLINE Acc mac(Acc acc, VI a, VI b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static PFA_INLINE void convert(DType dtype, const void* row, int64_t d, int64_t padded,
                                 const Conversion& how, Element* out) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      const VF x = load_as_float(dtype, row, i, lanes_at(i, d));
      const VF channel = how.channel_scales ? load(how.channel_scales + i) : splat(1.0f);
      const VF factor = mul(channel, splat(how.scale));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm512_cvtsepi32_epi16(to_int(mul(x, factor))));
    }
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    return interleave_halves(reinterpret_cast<const uint16_t*>(rows), stride);
  }

  static PFA_INLINE void store_p(uint32_t* row, int column, VF p0, VF p1) {
    auto* out = reinterpret_cast<__m256i*>(reinterpret_cast<Element*>(row) + column);
    _mm256_storeu_si256(out, _mm512_cvtsepi32_epi16(to_int(p0)));
    _mm256_storeu_si256(out + 1, _mm512_cvtsepi32_epi16(to_int(p1)));
  }
  static float load_p(const uint32_t*, int) { return 0.0f; }  // such tiles are DotF32's

  struct Extent {
    float norm = 0.0f, peak = 0.0f;
  };
  static PFA_INLINE Extent row_extent(const SourceRows& rows, const void* row) {
    VF squares = splat(0.0f), largest = squares;
    for (int64_t i = 0; i < rows.d; i += kLanes) {
      const VF x = load_as_float(rows.dtype, row, i, lanes_at(i, rows.d));
      squares = fma(x, x, squares);
      largest = max(largest, abs(x));
    }
    return {std::sqrt(reduce_add(squares)), reduce_max(largest)};
  }
  // The largest power of two by which rows of this extent may be multiplied; 1 if they are zero.
  static float fitting_scale(Extent extent) {
    if (extent.norm == 0.0f) return 1.0f;
    return power_of_two(std::min(kMaxNorm / extent.norm, kMaxElement / extent.peak));
  }
  static float power_of_two(float x) {  // the largest not above x
    return bits_to_float(float_to_bits(x) & 0x7f800000u);
  }
  // The norm of a row with an infinity or NaN is infinite: accurate() then refuses it.
  static float choose_query_scale(const SourceRows& rows, const void* row, float* step,
                                  float* norm) {
    const Extent extent = row_extent(rows, row);
    const bool finite = extent.norm < INFINITY;
    const float scale = finite ? fitting_scale(extent) : 1.0f;
    *step = 1.0f / scale;
    *norm = finite ? extent.norm : INFINITY;
    return scale;
  }
  static float choose_key_scale(const SourceRows& keys, int64_t begin, int64_t end,
                                TileHeader& header) {
    Extent largest;
    bool finite = true;
    for (int64_t j = begin; j < end; ++j) {
      const Extent extent = row_extent(keys, keys.row(j));
      finite &= extent.norm < INFINITY;  // false for NaN
      largest.norm = std::max(largest.norm, extent.norm);
      largest.peak = std::max(largest.peak, extent.peak);
    }
    if (!finite) header.inexact = true;
    const float scale = finite ? fitting_scale(largest) : 1.0f;
    header.key_step = 1.0f / scale;
    header.key_norm = largest.norm;
    return scale;
  }
  // Powers of two that bring every channel's largest value to (1/2, 1]; false if one is not finite.
  static bool choose_channel_scales(const SourceRows& values, int64_t begin, int64_t end,
                                    int64_t padded, float* scales) {
    bool finite = true;
    for (int64_t i = 0; i < padded; i += kLanes) {
      VF largest = splat(0.0f), not_finite = largest;
      for (int64_t j = begin; j < end; ++j) {
        const VF x = load_as_float(values.dtype, values.row(j), i, lanes_at(i, values.d));
        largest = max(abs(x), largest);
        not_finite = fma(x, splat(0.0f), not_finite);
      }
      finite &= _mm512_cmp_ps_mask(not_finite, splat(0.0f), _CMP_EQ_OQ) == 0xffff;
      store(scales + i, largest);
      for (int64_t d = i; d < i + kLanes; ++d) {
        scales[d] = scales[d] > 0.0f ? power_of_two(1.0f / scales[d]) : 1.0f;
      }
    }
    return finite;
  }
  // Powers of two that bring every key's largest scaled value to (kMaxElement / 2, kMaxElement].
  // False where more than a quarter of a channel's values would keep fewer than 9 bits: what a few
  // such lose vanishes in the rounding of the others.
  static bool choose_row_scales(const SourceRows& values, int64_t begin, int64_t end,
                                const float* channel_scales, float* scales) {
    alignas(64) float small[512] = {};
    for (int64_t j = begin; j < end; ++j) {
      VF largest = splat(0.0f);
      const auto magnitude = [&](int64_t i) PFA_INLINE_LAMBDA {
        const VF x = load_as_float(values.dtype, values.row(j), i, lanes_at(i, values.d));
        return abs(mul(x, load(channel_scales + i)));
      };
      for (int64_t i = 0; i < values.d; i += kLanes) largest = max(magnitude(i), largest);
      const float peak = reduce_max(largest);
      const float scale = peak > 0.0f ? power_of_two(kMaxElement / peak) : 1.0f;
      scales[j - begin] = scale;
      for (int64_t i = 0; i < values.d; i += kLanes) {
        const VF x = magnitude(i);
        const __mmask16 is_small = _mm512_cmp_ps_mask(x, splat(512.0f / scale), _CMP_LT_OQ) &
                                   _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_GT_OQ);
        store(small + i,
              _mm512_mask_add_ps(load(small + i), is_small, load(small + i), splat(1.0f)));
      }
    }
    const auto allowed = static_cast<float>((end - begin) / 4 + 4);
    return *std::max_element(small, small + 512) <= allowed;
  }
  // Whether scores of such rows are wrong by at most 2^-11, root mean square, operands rounded
  // independently: no more than rounding a score near 1 to fp16 costs. `norm`s and steps are the
  // largest of a block of queries and a tile of keys.
  static bool accurate(float softmax_scale, float q_norm, float q_step, const TileHeader& header) {
    // Not std::hypot, for which g++ would ask for glibc 2.35.
    const double of_key = double{q_norm} * header.key_step, of_q = double{header.key_norm} * q_step;
    const double rounding = std::sqrt(of_key * of_key + of_q * of_q);
    return std::fabs(softmax_scale) * rounding * 0.289 <= 0x1p-11;  // 0.289 = 1 / sqrt(12)
  }
};

}  // namespace pfa::cpu::PFA_ISA
