// SPDX-License-Identifier: Apache-2.0
// Dot policies of AVX-512: bf16 pairs (AVX512_BF16) and int8 fours (AVX512_VNNI).
#pragma once

namespace pfa::cpu::PFA_ISA {

// lane i = low half rows[i], high half rows[stride + i]
PFA_INLINE VI interleave_halves(const uint16_t* rows, int64_t stride) {
  const VI low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
  const VI high =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + stride)));
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
  static PFA_INLINE void convert(DType, const void* row, int64_t d, int64_t padded,
                                 const Conversion&, Element* out) {
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
  static PFA_INLINE void convert(DType, const void* row, int64_t d, int64_t padded,
                                 const Conversion&, Element* out) {
    copy_row(row, d, padded, 1, out);
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    const VI low =
        _mm512_or_si512(widen_bytes(rows), _mm512_slli_epi32(widen_bytes(rows + stride), 8));
    const VI high = _mm512_or_si512(widen_bytes(rows + 2 * stride),
                                    _mm512_slli_epi32(widen_bytes(rows + 3 * stride), 8));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  // q is stored as q + 128, so every score starts at -128 * sum(k).
  static void initial_accumulators(const uint32_t* keys, int64_t groups, int columns,
                                   uint32_t* out) {
    for (int v = 0; v < columns; v += kLanes) {
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

}  // namespace pfa::cpu::PFA_ISA
