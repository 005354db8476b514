// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the kernels in plain C++ (the compilers' vector extension, four lanes):
// SSE2 on any x86-64, NEON on aarch64. See simd_avx512.h for what each function means.
#pragma once

namespace pfa::cpu::PFA_ISA {

constexpr int kLanes = 4;
typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));

PFA_INLINE VF splat(float x) { return VF{x, x, x, x}; }
PFA_INLINE VF load(const float* p) {
  VF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PFA_INLINE void store(float* p, VF x) { std::memcpy(p, &x, sizeof x); }
PFA_INLINE VF add(VF a, VF b) { return a + b; }
PFA_INLINE VF sub(VF a, VF b) { return a - b; }
PFA_INLINE VF mul(VF a, VF b) { return a * b; }
PFA_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
PFA_INLINE VF max(VF a, VF b) { return a > b ? a : b; }
PFA_INLINE VF min(VF a, VF b) { return a < b ? a : b; }
PFA_INLINE float reduce_max(VF a) { return std::max(std::max(a[0], a[1]), std::max(a[2], a[3])); }
PFA_INLINE float reduce_add(VF a) { return (a[0] + a[1]) + (a[2] + a[3]); }

PFA_INLINE VI isplat(int32_t x) { return VI{x, x, x, x}; }
PFA_INLINE VI iload(const void* p) {
  VI x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PFA_INLINE void istore(void* p, VI x) { std::memcpy(p, &x, sizeof x); }
PFA_INLINE VI imax(VI a, VI b) { return a > b ? a : b; }
PFA_INLINE int32_t reduce_imax(VI a) {
  return std::max(std::max(a[0], a[1]), std::max(a[2], a[3]));
}
PFA_INLINE VF as_float(VI a) { return reinterpret_cast<VF>(a); }
PFA_INLINE VI as_int(VF a) { return reinterpret_cast<VI>(a); }
PFA_INLINE VI as_int(VI a) { return a; }
PFA_INLINE VF to_float(VI a) { return __builtin_convertvector(a, VF); }
PFA_INLINE VF to_float(VF a) { return a; }

// Adding and subtracting 1.5 * 2^23 leaves the nearest integer, ties to even, of |a| < 2^22.
PFA_INLINE VF round_even(VF a) {
  const VF magic = splat(12582912.0f);
  return (a + magic) - magic;
}
PFA_INLINE VI to_int(VF a) { return __builtin_convertvector(round_even(a), VI); }

template <int kDegree>
PFA_INLINE VF exp2(VF x) {
  static_assert(kDegree >= 3 && kDegree <= 5);
  const VF low = splat(-127.0f);
  const VF bounded = x < low ? low : (x > splat(128.0f) ? splat(128.0f) : x);  // keeps NaN
  const VF n = round_even(bounded - splat(0.5f));  // floor, or one less at integers
  const VF f = bounded - n;                        // [0, 1]
  VF p = fma(f, splat(0.00187931862f), splat(0.00899099465f));
  p = fma(f, p, splat(0.0558186769f));
  p = fma(f, p, splat(0.240159273f));
  p = fma(f, p, splat(0.693151712f));
  p = fma(f, p, splat(1.0f));
  const VI exponent = (__builtin_convertvector(n, VI) + isplat(127)) << 23;
  const VF scaled = p * as_float(exponent);
  return x < low ? splat(0.0f) : scaled;
}

PFA_INLINE VF add_bias(VF x, VF bias) { return bias == splat(-INFINITY) ? bias : x + bias; }
PFA_INLINE VF keep_range(VF x, int begin, int end) {
  const VI lane = {0, 1, 2, 3};
  const VI inside = (lane >= isplat(begin)) & (lane < isplat(end));
  return inside ? x : splat(-INFINITY);
}
PFA_INLINE VF drop_masked(VF x, const uint8_t* mask, int count) {
  for (int i = 0; i < std::min(count, kLanes); ++i) {
    if (mask[i]) x[i] = -INFINITY;
  }
  return x;
}

PFA_INLINE VF load_f16(const uint16_t* p, int count) {
  VF x = splat(0.0f);
  for (int i = 0; i < count; ++i) x[i] = f16_to_float(p[i]);
  return x;
}
PFA_INLINE VF load_bf16(const uint16_t* p, int count) {
  VF x = splat(0.0f);
  for (int i = 0; i < count; ++i) x[i] = bf16_to_float(p[i]);
  return x;
}
PFA_INLINE VF load_s8(const int8_t* p, int count) {
  VF x = splat(0.0f);
  for (int i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
PFA_INLINE void store_f16(uint16_t* p, VF x, int count) {
  for (int i = 0; i < count; ++i) p[i] = float_to_f16(x[i]);
}
PFA_INLINE void store_bf16(uint16_t* p, VF x, int count) {
  for (int i = 0; i < count; ++i) p[i] = float_to_bf16(x[i]);
}
PFA_INLINE void store_s8(int8_t* p, VI x, int count) {
  for (int i = 0; i < count; ++i) p[i] = static_cast<int8_t>(std::clamp(x[i], -128, 127));
}

// out[r][c] = in[c][r] for 16 x 16 words; strides in words.
inline void transpose_words(const uint32_t* in, int64_t in_stride, uint32_t* out,
                            int64_t out_stride) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) out[r * out_stride + c] = in[c * in_stride + r];
  }
}

}  // namespace pfa::cpu::PFA_ISA
