// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels, for AVX-512 (F, BW, DQ, VL). Included inside the target
// region of a kernel_*.cpp, which names the namespace; simd_avx2.h and simd_portable.h have the
// same functions. Lane i of a vector holds column i. `count` is a number of leading lanes; memory
// past it is never touched.
#pragma once

#include "half.h"

namespace pfa::cpu::PFA_ISA {

constexpr int kLanes = 16;
using VF = __m512;   // 16 floats
using VI = __m512i;  // 16 int32, or 64 bytes of packed operands

PFA_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

PFA_INLINE VF splat(float x) { return _mm512_set1_ps(x); }
PFA_INLINE VF load(const float* p) { return _mm512_loadu_ps(p); }
PFA_INLINE void store(float* p, VF x) { _mm512_storeu_ps(p, x); }
PFA_INLINE VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
PFA_INLINE VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
PFA_INLINE VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
PFA_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
PFA_INLINE VF max(VF a, VF b) { return _mm512_max_ps(a, b); }  // b when either is NaN
PFA_INLINE VF min(VF a, VF b) { return _mm512_min_ps(a, b); }  // b when either is NaN
PFA_INLINE VF round_even(VF a) { return _mm512_roundscale_ps(a, 0x08); }
PFA_INLINE VF abs(VF a) { return _mm512_abs_ps(a); }
PFA_INLINE float reduce_max(VF a) { return _mm512_reduce_max_ps(a); }
PFA_INLINE float reduce_add(VF a) { return _mm512_reduce_add_ps(a); }

PFA_INLINE VI isplat(int32_t x) { return _mm512_set1_epi32(x); }
PFA_INLINE VI iload(const void* p) { return _mm512_loadu_si512(p); }
PFA_INLINE void istore(void* p, VI x) { _mm512_storeu_si512(p, x); }
PFA_INLINE VI imax(VI a, VI b) { return _mm512_max_epi32(a, b); }
PFA_INLINE int32_t reduce_imax(VI a) { return _mm512_reduce_max_epi32(a); }
PFA_INLINE VF as_float(VI a) { return _mm512_castsi512_ps(a); }  // same bits
PFA_INLINE VI as_int(VF a) { return _mm512_castps_si512(a); }
PFA_INLINE VI as_int(VI a) { return a; }
PFA_INLINE VF to_float(VI a) { return _mm512_cvtepi32_ps(a); }
PFA_INLINE VF to_float(VF a) { return a; }
PFA_INLINE VI to_int(VF a) { return _mm512_cvtps_epi32(a); }  // nearest even

// 2^x with relative error 3.4e-6 (degree 4) or 1e-4 (degree 3) or 1e-7 (5); exact at integers.
// 2^-inf = 0, NaN stays NaN. Coefficients: minimax on [0, 1] with both ends fixed.
template <int kDegree>
PFA_INLINE VF exp2(VF x) {
  constexpr int kRoundDown = 0x09;
  const VF f = _mm512_reduce_ps(x, kRoundDown);  // x - floor(x); 0 for infinities
  VF p;
  if constexpr (kDegree == 3) {
    p = fma(f, splat(0.0782679692f), splat(0.226307675f));
    p = fma(f, p, splat(0.695424378f));
  } else if constexpr (kDegree == 4) {
    p = fma(f, splat(0.0135557475f), splat(0.0520323701f));
    p = fma(f, p, splat(0.241379768f));
    p = fma(f, p, splat(0.693032146f));
  } else {
    p = fma(f, splat(0.00187931862f), splat(0.00899099465f));
    p = fma(f, p, splat(0.0558186769f));
    p = fma(f, p, splat(0.240159273f));
    p = fma(f, p, splat(0.693151712f));
  }
  p = fma(f, p, splat(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// x + bias; -inf where the bias is -inf, even if x is NaN: such a bias masks the pair.
PFA_INLINE VF add_bias(VF x, VF bias) {
  const __mmask16 masked = _mm512_cmp_ps_mask(bias, splat(-INFINITY), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(add(x, bias), masked, bias);
}

// Lanes outside [begin, end) become -inf.
PFA_INLINE VF keep_range(VF x, int begin, int end) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside = _mm512_cmp_epi32_mask(lane, isplat(begin), _MM_CMPINT_NLT) &
                           _mm512_cmp_epi32_mask(lane, isplat(end), _MM_CMPINT_LT);
  return _mm512_mask_mov_ps(splat(-INFINITY), inside, x);
}

// Lanes whose mask byte is nonzero become -inf.
PFA_INLINE VF drop_masked(VF x, const uint8_t* mask, int count) {
  const __m128i bytes = count >= kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask))
                                        : _mm_maskz_loadu_epi8(first(count), mask);
  return _mm512_mask_mov_ps(x, _mm_test_epi8_mask(bytes, bytes), splat(-INFINITY));
}

PFA_INLINE VF load_f16(const uint16_t* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
PFA_INLINE VF load_bf16(const uint16_t* p, int count) {
  const __m256i h = _mm256_maskz_loadu_epi16(first(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
PFA_INLINE VF load_s8(const int8_t* p, int count) {
  return to_float(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), p)));
}
PFA_INLINE void store_f16(uint16_t* p, VF x, int count) {
  _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
PFA_INLINE void store_bf16(uint16_t* p, VF x, int count) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), isplat(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, isplat(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_or_epi32(rounded, nan, bits, isplat(0x400000));
  _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
}
PFA_INLINE void store_s8(int8_t* p, VI x, int count) {  // saturates
  _mm_mask_storeu_epi8(p, first(count), _mm512_cvtsepi32_epi8(x));
}

// out[r][c] = in[c][r] for 16 x 16 words; strides in words.
inline void transpose_words(const uint32_t* in, int64_t in_stride, uint32_t* out,
                            int64_t out_stride) {
  __m512i t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) t[i] = iload(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    u[2 * i] = _mm512_unpacklo_epi32(t[2 * i], t[2 * i + 1]);
    u[2 * i + 1] = _mm512_unpackhi_epi32(t[2 * i], t[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[4 * i] = _mm512_unpacklo_epi64(u[4 * i], u[4 * i + 2]);
    t[4 * i + 1] = _mm512_unpackhi_epi64(u[4 * i], u[4 * i + 2]);
    t[4 * i + 2] = _mm512_unpacklo_epi64(u[4 * i + 1], u[4 * i + 3]);
    t[4 * i + 3] = _mm512_unpackhi_epi64(u[4 * i + 1], u[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // t[4 g + i] holds column i of every 4-lane block of row group g
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    istore(out + i * out_stride, _mm512_shuffle_i32x4(a, b, 0x88));
    istore(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(c, d, 0x88));
    istore(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    istore(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

}  // namespace pfa::cpu::PFA_ISA
