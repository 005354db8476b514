// SPDX-License-Identifier: Apache-2.0
// Dot policies of AMX. They pack like their AVX-512 namesakes; strip_tiles.h multiplies.
#pragma once

namespace pfa::cpu::PFA_ISA {

// The products with bf16 operands: score of q and k, weigh of P and v.
struct Bf16Products {
  template <int kC, int kA, int kB>
  static PFA_INLINE void score() {
    tile_dot_bf16<kC, kA, kB>();
  }
  template <int kC, int kA, int kB>
  static PFA_INLINE void weigh() {
    tile_dot_bf16<kC, kA, kB>();
  }
};

// bf16 pairs.
struct TileBf16 : DotBf16, Bf16Products {
  using Session = TileSession;
  static constexpr int kGroupAlign = kTileWords;
};

// int8 fours; q and k signed, P unsigned.
struct TileI8 : DotI8 {
  using Session = TileSession;
  static constexpr int kGroupAlign = kTileWords;
  static constexpr bool kUnsignedA = false;

  template <int kC, int kA, int kB>
  static PFA_INLINE void score() {
    tile_dot_int8<kC, kA, kB, false>();
  }
  template <int kC, int kA, int kB>
  static PFA_INLINE void weigh() {
    tile_dot_int8<kC, kA, kB, true>();
  }
};

// fp16 as the exact sum of two bf16, high + low; P likewise, to 16 bits. Three of the four products
// count: low . low is below 2^-16 of the whole.
struct TileSplit : Bf16Products {
  using Element = uint16_t;
  using Acc = VF;
  using Session = TileSession;
  static constexpr int kPack = 2, kPlanes = 2, kGroupAlign = kTileWords, kDegree = 4;
  static constexpr bool kInt = false, kScaled = false, kUnsignedA = false, kQuantised = false;

  // The 16 leading bits of a float: what bf16 can hold without rounding up.
  static PFA_INLINE VF high_part(VF x) {
    return as_float(_mm512_and_si512(as_int(x), isplat(static_cast<int32_t>(0xffff0000u))));
  }
  static PFA_INLINE __m256i truncate(VF x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(as_int(x), 16));
  }
  static PFA_INLINE void convert(DType dtype, const void* row, int64_t d, int64_t padded,
                                 const Conversion& how, Element* out) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      const VF x = load_as_float(dtype, row, i, lanes_at(i, d));
      const VF high = high_part(x);
      // Infinities and NaN belong to the high part alone: their difference would be NaN.
      const __mmask16 finite = _mm512_cmp_ps_mask(abs(x), splat(INFINITY), _CMP_LT_OQ);
      const VF low = _mm512_maskz_sub_ps(finite, x, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          truncate(how.plane == 0 ? high : low));
    }
  }
  static PFA_INLINE VI interleave(const Element* rows, int64_t stride) {
    return interleave_halves(rows, stride);
  }
  static PFA_INLINE void store_p(uint32_t* row, int column, VF p0, VF p1) {
    const VF h0 = high_part(p0), h1 = high_part(p1);
    auto* high = reinterpret_cast<uint16_t*>(row) + column;
    uint16_t* low = high + kMaxBlockN;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), truncate(h0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + kLanes), truncate(h1));
    istore(low, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sub(p1, h1), sub(p0, h0))));
  }
  static float load_p(const uint32_t* row, int column) {
    const auto* high = reinterpret_cast<const uint16_t*>(row) + column;
    return bf16_to_float(high[0]) + bf16_to_float(high[kMaxBlockN]);
  }
};

}  // namespace pfa::cpu::PFA_ISA
