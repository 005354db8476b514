// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels for AVX2, FMA and F16C. See simd_avx512.h for what each
// function means.
#pragma once

namespace pfa::cpu::PFA_ISA {

constexpr int kLanes = 8;
using VF = __m256;
using VI = __m256i;

PFA_INLINE VF splat(float x) { return _mm256_set1_ps(x); }
PFA_INLINE VF load(const float* p) { return _mm256_loadu_ps(p); }
PFA_INLINE void store(float* p, VF x) { _mm256_storeu_ps(p, x); }
PFA_INLINE VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
PFA_INLINE VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
PFA_INLINE VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
PFA_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
PFA_INLINE VF max(VF a, VF b) { return _mm256_max_ps(a, b); }
PFA_INLINE VF min(VF a, VF b) { return _mm256_min_ps(a, b); }
PFA_INLINE float reduce_max(VF a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
PFA_INLINE float reduce_add(VF a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

PFA_INLINE VI isplat(int32_t x) { return _mm256_set1_epi32(x); }
PFA_INLINE VI iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PFA_INLINE void istore(void* p, VI x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
PFA_INLINE VI imax(VI a, VI b) { return _mm256_max_epi32(a, b); }
PFA_INLINE int32_t reduce_imax(VI a) {
  alignas(32) int32_t lanes[kLanes];
  istore(lanes, a);
  return *std::max_element(lanes, lanes + kLanes);
}
PFA_INLINE VF as_float(VI a) { return _mm256_castsi256_ps(a); }
PFA_INLINE VI as_int(VF a) { return _mm256_castps_si256(a); }
PFA_INLINE VI as_int(VI a) { return a; }
PFA_INLINE VF to_float(VI a) { return _mm256_cvtepi32_ps(a); }
PFA_INLINE VF to_float(VF a) { return a; }
PFA_INLINE VI to_int(VF a) { return _mm256_cvtps_epi32(a); }
PFA_INLINE VF round_even(VF a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <int kDegree>
PFA_INLINE VF exp2(VF x) {
  const VF bounded = min(splat(128.0f), max(splat(-127.0f), x));  // keeps NaN: it is the second
  const VF n = _mm256_floor_ps(bounded);
  const VF f = sub(bounded, n);
  VF p;
  if constexpr (kDegree == 4) {
    p = fma(f, splat(0.0135557475f), splat(0.0520323701f));
    p = fma(f, p, splat(0.241379768f));
    p = fma(f, p, splat(0.693032146f));
  } else {
    static_assert(kDegree == 5);
    p = fma(f, splat(0.00187931862f), splat(0.00899099465f));
    p = fma(f, p, splat(0.0558186769f));
    p = fma(f, p, splat(0.240159273f));
    p = fma(f, p, splat(0.693151712f));
  }
  p = fma(f, p, splat(1.0f));
  // 2^n by its exponent bits; n = -127 gives 0.
  const VI exponent = _mm256_slli_epi32(_mm256_add_epi32(to_int(n), isplat(127)), 23);
  return mul(p, as_float(exponent));
}

PFA_INLINE VF add_bias(VF x, VF bias) {
  const VF masked = _mm256_cmp_ps(bias, splat(-INFINITY), _CMP_EQ_OQ);
  return _mm256_blendv_ps(add(x, bias), bias, masked);
}
PFA_INLINE VI lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
PFA_INLINE VF keep_range(VF x, int begin, int end) {
  const VI inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(isplat(begin), lane_index()),
                                        _mm256_cmpgt_epi32(isplat(end), lane_index()));
  return _mm256_blendv_ps(splat(-INFINITY), x, as_float(inside));
}

// Eight 1-byte or 2-byte elements of which count exist; the others are 0.
PFA_INLINE __m128i load_bytes(const void* p, int count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, p, static_cast<size_t>(std::min(count, kLanes)));
  return _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
}
PFA_INLINE __m128i load_halves(const uint16_t* p, int count) {
  if (count >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t halves[kLanes] = {};
  std::memcpy(halves, p, static_cast<size_t>(count) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
}

PFA_INLINE VF drop_masked(VF x, const uint8_t* mask, int count) {
  const VI bytes = _mm256_cvtepu8_epi32(load_bytes(mask, count));
  const VI kept = _mm256_cmpeq_epi32(bytes, isplat(0));
  return _mm256_blendv_ps(splat(-INFINITY), x, as_float(kept));
}

PFA_INLINE VF load_f16(const uint16_t* p, int count) {
  return _mm256_cvtph_ps(load_halves(p, count));
}
PFA_INLINE VF load_bf16(const uint16_t* p, int count) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, count)), 16));
}
PFA_INLINE VF load_s8(const int8_t* p, int count) {
  return to_float(_mm256_cvtepi8_epi32(load_bytes(p, count)));
}
PFA_INLINE void store_halves(uint16_t* p, __m128i halves, int count) {
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    return;
  }
  alignas(16) uint16_t staged[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(staged), halves);
  std::memcpy(p, staged, static_cast<size_t>(count) * 2);
}
PFA_INLINE void store_f16(uint16_t* p, VF x, int count) {
  store_halves(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), count);
}
PFA_INLINE void store_bf16(uint16_t* p, VF x, int count) {
  alignas(32) float staged[kLanes];
  store(staged, x);
  for (int i = 0; i < count; ++i) p[i] = float_to_bf16(staged[i]);
}
PFA_INLINE void store_s8(int8_t* p, VI x, int count) {
  alignas(32) int32_t staged[kLanes];
  istore(staged, x);
  for (int i = 0; i < count; ++i) p[i] = static_cast<int8_t>(std::clamp(staged[i], -128, 127));
}

// out[r][c] = in[c][r] for 8 x 8 words; strides in words.
PFA_INLINE void transpose_8x8(const uint32_t* in, int64_t in_stride, uint32_t* out,
                              int64_t out_stride) {
  VF t[8], u[8];
  for (int i = 0; i < 8; ++i) t[i] = as_float(iload(in + i * in_stride));
  for (int i = 0; i < 4; ++i) {
    u[2 * i] = _mm256_unpacklo_ps(t[2 * i], t[2 * i + 1]);
    u[2 * i + 1] = _mm256_unpackhi_ps(t[2 * i], t[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    t[4 * i] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0x44);
    t[4 * i + 1] = _mm256_shuffle_ps(u[4 * i], u[4 * i + 2], 0xee);
    t[4 * i + 2] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0x44);
    t[4 * i + 3] = _mm256_shuffle_ps(u[4 * i + 1], u[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    istore(out + i * out_stride, as_int(_mm256_permute2f128_ps(t[i], t[4 + i], 0x20)));
    istore(out + (4 + i) * out_stride, as_int(_mm256_permute2f128_ps(t[i], t[4 + i], 0x31)));
  }
}
inline void transpose_words(const uint32_t* in, int64_t in_stride, uint32_t* out,
                            int64_t out_stride) {
  for (int r = 0; r < 16; r += 8) {
    for (int c = 0; c < 16; c += 8) {
      transpose_8x8(in + c * in_stride + r, in_stride, out + r * out_stride + c, out_stride);
    }
  }
}

}  // namespace pfa::cpu::PFA_ISA
