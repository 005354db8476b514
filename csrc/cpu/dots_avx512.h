// SPDX-License-Identifier: Apache-2.0
// Dot policies of AVX-512: bf16 pairs (AVX512_BF16), int8 fours and int16 pairs (AVX512_VNNI).
#pragma once

namespace pfa::cpu::PFA_ISA {

// lane i = low half rows[i], high half rows[stride + i]
PFA_INLINE VI interleave_halves(const uint16_t* rows, int64_t stride) {
  const VI low = _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
  const VI high = _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + stride)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Copies d elements of `size` bytes and zeroes up to padded.
PFA_INLINE void copy_row(const void* row, int64_t d, int64_t padded, int64_t size, void* out) {
  std::memcpy(out, row, static_cast<size_t>(d * size));
  std::memset(static_cast<std::byte*>(out) + d * size, 0, static_cast<size_t>((padded - d) * size));
}

struct DotBf16 {
  using Element = uint16_t;
  using Acc = VF;
  using Session = NoSession;
  static constexpr int kPack = 2, kPlanes = 1, kGroupAlign = 1, kDegree = 3;
  static constexpr bool kInt = false, kScaled = false, kUnsignedA = false, kQuantised = false;

  static PFA_INLINE Acc zero() { return splat(0.0f); }
  static PFA_INLINE Acc mac(Acc acc, VI a, VI b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static PFA_INLINE void convert(DType, const void* row, int64_t d, int64_t padded, const Conversion&,
                                 Element* out) {
    copy_row(row, d, padded, 2, out);
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    return interleave_halves(rows, stride);
  }
  static PFA_INLINE void store_p(uint32_t* row, int column, VF p0, VF p1) {
    istore(row + column / kPack, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1, p0)));
  }
  static float load_p(const uint32_t* row, int column) {
    return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[column]);
  }
};

PFA_INLINE VI widen_bytes(const int8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct DotI8 {
  using Element = int8_t;
  using Acc = VI;
  using Session = NoSession;
  static constexpr int kPack = 4, kPlanes = 1, kGroupAlign = 1, kDegree = 4;
  static constexpr bool kInt = true, kScaled = false, kUnsignedA = true, kQuantised = true;

  static PFA_INLINE Acc zero() { return isplat(0); }
  static PFA_INLINE Acc mac(Acc acc, VI a, VI b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static PFA_INLINE void convert(DType, const void* row, int64_t d, int64_t padded, const Conversion&,
                                 Element* out) {
    copy_row(row, d, padded, 1, out);
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    const VI low = _mm512_or_si512(widen_bytes(rows), _mm512_slli_epi32(widen_bytes(rows + stride), 8));
    const VI high = _mm512_or_si512(widen_bytes(rows + 2 * stride),
                                    _mm512_slli_epi32(widen_bytes(rows + 3 * stride), 8));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  // q is stored as q + 128, so every score starts at -128 * sum(k).
  static void initial_accumulators(const uint32_t* keys, int64_t groups, uint32_t* out) {
    for (int v = 0; v < kPanel; v += kLanes) {
      VI sum = isplat(0);
      for (int64_t g = 0; g < groups; ++g) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), iload(keys + g * kPanel + v));
      }
      istore(out + v, _mm512_sub_epi32(isplat(0), sum));
    }
  }
  static PFA_INLINE void store_p(uint32_t* row, int column, VF p0, VF p1) {
    auto* out = reinterpret_cast<__m128i*>(reinterpret_cast<int8_t*>(row) + column);
    _mm_storeu_si128(out, _mm512_cvtepi32_epi8(to_int(p0)));
    _mm_storeu_si128(out + 1, _mm512_cvtepi32_epi8(to_int(p1)));
  }
  static float load_p(const uint32_t* row, int column) {
    return reinterpret_cast<const uint8_t*>(row)[column];
  }
};

// fp16 attention in 16-bit fixed point: twice the multiply-adds of fp32 FMAs, and closer to the
// exact result than fp16 arithmetic. Steps are powers of two, so the largest operands keep all of
// fp16's bits; pack.h and attend.h turn to DotF32 wherever what the others lose could matter.
// Sums never leave int32: |q . k| <= |q| |k| < 2^31 and |p . v| <= sum(p) max|v| < 2^31.
struct DotI16 {
  using Element = int16_t;
  using Acc = VI;
  using Session = NoSession;
  static constexpr int kPack = 2, kPlanes = 1, kGroupAlign = 1, kDegree = 4;
  static constexpr bool kInt = true, kScaled = true, kUnsignedA = false, kQuantised = false;

  static constexpr float kMaxNorm = 46300.0f;  // sqrt(2^31) less what rounding can add
  static constexpr float kMaxElement = 32767.0f;
  // V gets 13 bits, so that the P of a flat row over a tile keep 10: then both lose about as much.
  static constexpr float kMaxValue = 8191.0f;
  static constexpr float kMaxSumP = 261000.0f;  // times kMaxValue is below 2^31, likewise

  static PFA_INLINE Acc zero() { return isplat(0); }
  static PFA_INLINE Acc mac(Acc acc, VI a, VI b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static PFA_INLINE void convert(DType dtype, const void* row, int64_t d, int64_t padded,
                                 const Conversion& how, Element* out) {
    const VF uniform = splat(how.scales[0]);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const VF x = load_as_float(dtype, row, i, lanes_at(i, d));
      const VF factor = how.stride == 0 ? uniform : load(how.scales + i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm512_cvtsepi32_epi16(to_int(mul(x, factor))));
    }
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    return interleave_halves(reinterpret_cast<const uint16_t*>(rows), stride);
  }

  // P in units of the returned step, chosen so that the row's sum fits kMaxSumP.
  static PFA_INLINE float store_fixed(const uint32_t* row, float sum, int columns, uint32_t* p) {
    const float scale = sum * kMaxElement > kMaxSumP ? kMaxSumP / sum : kMaxElement;
    const auto* values = reinterpret_cast<const float*>(row);
    auto* out = reinterpret_cast<__m256i*>(p);
    for (int i = 0; i < columns; i += kLanes) {
      const VI rounded = to_int(mul(load(values + i), splat(scale)));
      _mm256_storeu_si256(out++, _mm512_cvtsepi32_epi16(rounded));
    }
    return 1.0f / scale;
  }

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
  static float choose_query_scale(const SourceRows& rows, const void* row, float* step,
                                  float* norm) {
    const Extent extent = row_extent(rows, row);
    const float scale = fitting_scale(extent);
    *step = 1.0f / scale;
    *norm = extent.norm;
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
  // Values below 1/32 of their channel's largest keep fewer than 8 bits. A few such are lost in
  // the rounding of the others; where they are many, the tile is left to DotF32.
  static void choose_value_scales(const SourceRows& values, int64_t begin, int64_t end,
                                  int64_t padded, TileHeader& header, float* scales,
                                  float* steps) {
    const float allowed = static_cast<float>((end - begin) / 4 + 4);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const int count = lanes_at(i, values.d);
      VF largest = splat(0.0f), small = largest, finite = largest;
      for (int64_t j = begin; j < end; ++j) {
        const VF x = load_as_float(values.dtype, values.row(j), i, count);
        largest = max(abs(x), largest);
        finite = fma(x, splat(0.0f), finite);
      }
      const VF threshold = mul(largest, splat(1.0f / 32));
      for (int64_t j = begin; j < end; ++j) {
        const VF x = abs(load_as_float(values.dtype, values.row(j), i, count));
        const __mmask16 is_small = _mm512_cmp_ps_mask(x, threshold, _CMP_LT_OQ) &
                                   _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_GT_OQ);
        small = _mm512_mask_add_ps(small, is_small, small, splat(1.0f));
      }
      const bool all_finite = _mm512_cmp_ps_mask(finite, splat(0.0f), _CMP_EQ_OQ) == 0xffff;
      if (!all_finite || reduce_max(small) > allowed) header.inexact = true;
      alignas(64) float peaks[kLanes];
      store(peaks, largest);
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool fits = all_finite && peaks[lane] > 0.0f;
        scales[i + lane] = fits ? power_of_two(kMaxValue / peaks[lane]) : 1.0f;
        steps[i + lane] = 1.0f / scales[i + lane];
      }
    }
  }
  // Whether scores of such rows are wrong by at most 2^-11, root mean square, operands rounded
  // independently: no more than rounding a score near 1 to fp16 costs. `norm`s and steps are the
  // largest of a block of queries and a tile of keys.
  static bool accurate(float softmax_scale, float q_norm, float q_step, const TileHeader& header) {
    const float rounding = std::hypot(q_norm * header.key_step, header.key_norm * q_step);
    return std::fabs(softmax_scale) * rounding * 0.289f <= 0x1p-11f;  // 0.289 = 1 / sqrt(12)
  }
  static float load_p(const uint32_t*, int) { return 0.0f; }  // such tiles are DotF32's
};

}  // namespace pfa::cpu::PFA_ISA
